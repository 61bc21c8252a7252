"""What goes into a GGUF file: a model or an adapter under GGUF's names, each setting and tensor checked beforehand."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.formats.gguf.blocks import WRITTEN, quant_sizes
from tt_ckpt.formats.gguf.file import GGUF, GGUFTensor
from tt_ckpt.formats.gguf.keys import attention_note, rope_tensors, values_of
from tt_ckpt.formats.gguf.names import ARCHITECTURES, architecture_for, gguf_names
from tt_ckpt.formats.gguf.tokenizer import tokenizer_files
from tt_ckpt.formats.gguf.vocabulary import vocabulary_of
from tt_ckpt.formats.gguf.writer import GGUFPlan
from tt_ckpt.formats.translation import rotated_heads, to_interleaved
from tt_ckpt.hf.base_tensors import meta
from tt_ckpt.hf.weights import EMBEDDING, OUTPUT, Weights, in_pieces, is_finite, num_not_finite
from tt_ckpt.safetensors_file import TensorSpec
from tt_ckpt.shown import counted, listed, plain, quoted

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type
_QUANTIZATION_VERSION = 2
_EXACT = ("token_embd.weight", "output.weight")  # Q8_0 in a Q4_0 file: their errors reach every logit
_EMBEDDING, _ROUTER = "token_embd.weight", "ffn_gate_inp.weight"
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def plan_model(
    weights: Weights, folder: Path, *, kind: str | None = None, values: Mapping[str, Any] | None = None
) -> GGUFPlan:
    """A model as a GGUF file: everything about it but the values of its tensors, checked. Nothing is written.

    ``weights``: with a complete config, as ``tt_models.config_to_hf`` writes it. ``folder``: has the tokenizer,
    template and generation files. ``kind``: of the matrices (F32, F16, BF16, Q8_0, Q4_0; default: as the embedding).
    Vectors are F32. ``values``: more keys.

    Raises:
        ValueError: naming each setting, tensor or part of the tokenizer that a GGUF file cannot express.
    """
    quant_sizes()
    config = weights.config
    parts, shapes = tensors_of(config, weights.specs)
    extra = rope_tensors(config)
    shapes |= {name: tuple(tensor.shape) for name, tensor in extra.items()}
    kind = kind or DTYPES.get(weights.specs[EMBEDDING].dtype, "F16")
    check_kind(kind)
    kinds = {name: _kind_of(name, shape, kind) for name, shape in shapes.items()}
    vocabulary = vocabulary_of(folder, shapes[_EMBEDDING][0], config.get("eos_token_id"))
    found = values_of(config, shapes) | vocabulary.values | dict(values or {})
    found |= {"general.type": "model", "general.file_type": _FILE_TYPES[kind]}
    found["general.name"] = _name(str(found.get("general.name", "model")), strips=vocabulary.strips_as_phi3)
    if any(one.startswith("Q") for one in kinds.values()):
        found["general.quantization_version"] = _QUANTIZATION_VERSION
    notes = [*vocabulary.notes, *attention_note(config)]
    if odd := sorted(name for name, one in kinds.items() if one == "F16" and kind.startswith("Q")):
        some = counted(len(odd), "tensor")
        notes.append(f"{some} in F16, since rows do not divide into blocks of 32: {listed(odd, 2)}")

    def rows(name: str) -> Iterator[Tensor]:
        if name in extra:
            yield extra[name].view(1, -1)
        for key in parts.get(name, ()):
            hollow = meta(weights.specs[key])
            is_same = _as_in_gguf(hollow, key, config) is hollow
            for piece in weights.pieces(key) if is_same else in_pieces(_as_in_gguf(weights.get(key), key, config)):
                if not is_finite(piece):
                    count = sum(map(num_not_finite, weights.pieces(key)))
                    raise ValueError(f"{plain(key)}: {_not_finite(count)}; use another checkpoint")
                yield piece

    return GGUFPlan(kind=kind, values=found, kinds=kinds, shapes=shapes, rows=rows, notes=tuple(notes))


def _name(name: str, *, strips: bool) -> str:
    """llama.cpp takes white space away after the added tokens of models that are called phi-3, and of no others.

    It fails to load such a model if it lacks a token of Phi 3's.
    """
    if strips:
        return name if _PHI3.search(name) else f"{name} (phi-3)"
    return _PHI3.sub("phi 3", name)


def tensors_of(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]]]:
    """Hugging Face names in each tensor of a GGUF file, and its shape: experts are stacked, a tied head is absent."""
    tied = bool(config.get("tie_word_embeddings"))
    parts = gguf_names(str(config.get("model_type")), [key for key in specs if key != OUTPUT or not tied])
    if _EMBEDDING not in parts:
        raise ValueError(f"no {EMBEDDING} among the tensors; give a whole model")
    shapes = {name: specs[keys[0]].shape for name, keys in parts.items()}
    shapes |= {name: (len(keys), *shapes[name]) for name, keys in parts.items() if "_exps." in name}
    return parts, shapes


def check_kind(kind: str) -> None:
    if kind not in WRITTEN:
        raise ValueError(f"a GGUF file of type {quoted(kind)} is not written; known: {', '.join(WRITTEN)}")


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or name.endswith(_ROUTER):
        return "F32"
    if kind.startswith("Q") and shape[-1] % 32:
        return "F16"
    return "Q8_0" if kind == "Q4_0" and name in _EXACT else kind


def _as_in_gguf(tensor: Tensor, key: str, config: Mapping[str, Any]) -> Tensor:
    """Gemma's norms plus one; rows of query and key in pairs, if llama.cpp rotates pairs for this architecture."""
    arch = ARCHITECTURES[architecture_for(str(config["model_type"]))]
    if arch.norm_offset and key.endswith("norm.weight"):
        return tensor.float() + arch.norm_offset
    heads = rotated_heads(config).get(key.split(".")[-2]) if arch.interleaved else None
    return tensor if heads is None else to_interleaved(tensor, heads, key)


def read_back_tokenizer(plan: GGUFPlan, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokenizer's files as this package's reader makes them from the keys of a plan: name -> text."""
    where = Path("tokenizer.json")
    embedding = GGUFTensor(file=where, start=0, kind="F32", shape=plan.shapes[_EMBEDDING], row_bytes=0)
    ids = {f"{name}_token_id": plan.values.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    return tokenizer_files(GGUF(path=where, values=plan.values, tensors={_EMBEDDING: embedding}), {**config, **ids})


def plan_adapter(
    config: Mapping[str, Any],
    layers: Mapping[str, tuple[Tensor, Tensor, float]],
    *,
    kind: str = "F32",
    values: Mapping[str, Any] | None = None,
) -> GGUFPlan:
    """A LoRA adapter as a GGUF file. ``layers``: Hugging Face name of a base weight -> A [r, in], B [out, r], scale.

    llama.cpp adds ``alpha / r B A x`` with one alpha for all layers, so scales of their own are multiplied into B.

    Raises:
        ValueError: a layer that llama.cpp does not adapt.
    """
    quant_sizes()
    check_kind(kind)
    if kind.startswith("Q"):
        raise ValueError(f"an adapter of type {kind} is not written: its rows are short; known: F32, F16, BF16")
    names = gguf_names(str(config.get("model_type")), layers)
    if odd := [keys[0] for name, keys in names.items() if name == _EMBEDDING or "_exps." in name or _ROUTER in name]:
        raise ValueError(f"llama.cpp does not adapt {odd[0]}; merge the adapter")
    arch = architecture_for(str(config.get("model_type")))
    rank, scale = next((len(a), scale) for a, _, scale in layers.values())
    alpha = scale * rank
    tensors: dict[str, Tensor] = {}
    for name, keys in names.items():
        a, b, own = layers[keys[0]]
        for key, tensor in ((keys[0], a), (keys[0], b)):
            if not is_finite(tensor):
                raise ValueError(f"{plain(key)}: {_not_finite(num_not_finite(tensor), ' of its adapter')}")
        b = b if own == alpha / len(a) else b.float() * (own * len(a) / alpha)
        tensors[f"{name}.lora_a"] = a
        tensors[f"{name}.lora_b"] = _as_in_gguf(b, keys[0], config)
    found: dict[str, Any] = {"general.architecture": arch, **(values or {})}
    found |= {"general.type": "adapter", "general.file_type": _FILE_TYPES[kind]}
    found |= {"adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def rows(name: str) -> Iterator[Tensor]:
        return in_pieces(tensors[name])

    return GGUFPlan(kind=kind, values=found, kinds=dict.fromkeys(tensors, kind), shapes=shapes, rows=rows)


def _not_finite(count: int, where: str = "") -> str:
    return f"{counted(count, 'value')}{where} {'is' if count == 1 else 'are'} not finite"
