"""Architectures of GGUF files: the Hugging Face names of their tensors, and how their values differ."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tt_ckpt.hf.weights import EMBEDDING, OUTPUT
from tt_ckpt.shown import quoted

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT}
_TOP_OF = {ours: name for name, ours in _TOP.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_MATRICES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AROUND = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_ATTENTION = {name: ours for name, ours in _MATRICES.items() if name.startswith("attn")}
_BIASED = ("attn_q", "attn_k", "attn_v", "attn_output")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """``layer``: GGUF name within a block -> Hugging Face's within a layer.

    ``experts``: the same for stacked experts, with ``{}`` for the number of one.
    """

    model_type: str
    layer: Mapping[str, str] = field(default_factory=lambda: _MATRICES | _NORMS)
    experts: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ()  # that may be there
    interleaved: bool = False  # rows of q and k, as Meta has them
    norm_offset: float = 0.0  # added to every norm in the file


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", interleaved=True, biases=(*_BIASED, "ffn_gate", "ffn_up", "ffn_down")),
    "qwen2": Architecture(model_type="qwen2", biases=_BIASED[:3]),
    "qwen3": Architecture(model_type="qwen3", layer=_MATRICES | _NORMS | _HEAD_NORMS, biases=_BIASED),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        layer=_ATTENTION | _NORMS | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"},
        experts={f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
        biases=_BIASED,
    ),
    "gemma": Architecture(model_type="gemma", norm_offset=1.0),
    "gemma2": Architecture(model_type="gemma2", layer=_MATRICES | _AROUND, norm_offset=1.0),
    "gemma3": Architecture(model_type="gemma3_text", layer=_MATRICES | _AROUND | _HEAD_NORMS, norm_offset=1.0),
    "phi3": Architecture(
        model_type="phi3",
        layer={name: _MATRICES[name] for name in ("attn_output", "ffn_down")}
        | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", **_NORMS},
    ),
    "olmo2": Architecture(model_type="olmo2", layer=_MATRICES | _BEHIND | _HEAD_NORMS),
    "smollm3": Architecture(model_type="smollm3", interleaved=True, biases=_BIASED),
}
MIXTRAL = Architecture(  # written as architecture llama, with experts
    model_type="mixtral",
    layer=_ATTENTION | _NORMS | {"ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        f"ffn_{name}_exps": f"block_sparse_moe.experts.{{}}.{ours}"
        for name, ours in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    },
    interleaved=True,
)
IGNORED = re.compile(r"(blk\.\d+\.)?(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)\.weight")


def architecture_of(name: object, num_experts: int, path: Path) -> Architecture:
    if name == "llama" and num_experts:
        return MIXTRAL
    if not isinstance(name, str) or name not in ARCHITECTURES:
        close = difflib.get_close_matches(str(name)[:80], ARCHITECTURES, 1, 0.5)
        hint = f"; the nearest is {close[0]}" if close else ""
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {quoted(name)} is not converted{hint}; known: {known}")
    return ARCHITECTURES[name]


def architecture_for(model_type: str) -> str:
    """The architecture under which a model is written."""
    kinds = {arch.model_type: name for name, arch in ARCHITECTURES.items()} | {"mistral": "llama", "mixtral": "llama"}
    if model_type not in kinds:
        close = difflib.get_close_matches(model_type[:80], kinds, 1, 0.5)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise ValueError(
            f"config.json: model_type {quoted(model_type)} is not written as GGUF{hint}; known: {', '.join(kinds)}"
        )
    return kinds[model_type]


def gguf_names(model_type: str, keys: Iterable[str]) -> dict[str, list[str]]:
    """GGUF name -> the Hugging Face names of its tensor; several, in their order, if experts are stacked.

    ValueError that names a tensor for which the architecture has no place.
    """
    arch = MIXTRAL if model_type == "mixtral" else ARCHITECTURES[architecture_for(model_type)]
    layer = {ours: name for name, ours in arch.layer.items()}
    stacked = {ours: name for name, ours in arch.experts.items()}
    found: dict[str, dict[int, str]] = {}
    for key in keys:
        name, expert = _TOP_OF.get(key), 0
        if name is None and (match := _LAYER.fullmatch(key)) is not None:
            block, local, kind = match.groups()
            if (inside := _EXPERT.fullmatch(local)) is not None:
                expert, own = int(inside[2]), stacked.get(f"{inside[1]}.{{}}.{inside[3]}")
            else:
                own = layer.get(local)
            if own and (kind == "weight" or own in arch.biases):
                name = f"blk.{block}.{own}.{kind}"
        if name is None:
            raise ValueError(f"tensor {quoted(key)} has no place in a GGUF file of a {model_type} model")
        found.setdefault(name, {})[expert] = key
    for name, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"the experts of {name} are not numbered from 0: {sorted(parts)[:8]}")
    return {name: [parts[i] for i in range(len(parts))] for name, parts in found.items()}


def rename(arch: Architecture, name: str, path: Path) -> str:
    """The Hugging Face name of a tensor, with ``{}`` for the expert if experts are stacked."""
    if name in _TOP:
        return _TOP[name]
    if (match := _BLOCK.fullmatch(name)) is not None:
        block, (local, _, kind) = match[1], match[2].rpartition(".")
        known = arch.layer.get(local) or arch.experts.get(local)
        if known and (kind == "weight" or (kind == "bias" and local in arch.biases)):
            return f"model.layers.{block}.{known}.{kind}"
    known_names = [*_TOP, *(f"blk.N.{local}.weight" for local in [*arch.layer, *arch.experts])]
    close = difflib.get_close_matches(re.sub(r"blk\.\d+", "blk.N", name), known_names, 1, 0.5)
    hint = f"; the nearest is {close[0]}" if close else ""
    raise ValueError(f"{path}: tensor {quoted(name)} has no place in a {arch.model_type} model{hint}")


def check_blocks(names: Mapping[str, str], num_layers: int, arch: Architecture, path: Path) -> None:
    """ValueError unless there are ``num_layers`` blocks, each with all tensors of the architecture."""
    blocks: dict[int, set[str]] = {}
    for name in names:
        if (match := _BLOCK.fullmatch(name)) is not None:
            blocks.setdefault(int(match[1]), set()).add(match[2])
    needed = {f"{local}.weight" for local in [*arch.layer, *arch.experts]} | blocks.get(0, set())
    announced = f"({num_layers} blocks are announced); download it again"
    for i in range(num_layers):
        if absent := sorted(needed - blocks.get(i, set())):
            raise ValueError(f"{path}: lacks blk.{i}.{absent[0]} {announced}")
    if odd := sorted(i for i in blocks if i >= num_layers or blocks[i] != needed):
        raise ValueError(f"{path}: block {odd[0]} is not like the others {announced}")
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in names:
            raise ValueError(f"{path}: lacks {name}; a vocabulary or part of a model cannot be converted")
