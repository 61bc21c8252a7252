"""Meta's directories: ``consolidated.NN.pth`` (one part per model-parallel rank) with ``params.json``.

Also the form in which Mistral publishes: ``consolidated.safetensors`` with its own ``params.json``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt import commit
from tt_ckpt.pickles import write_pickled
from tt_ckpt.rename import Rename
from tt_ckpt.rotary import to_half_split, to_interleaved
from tt_ckpt.slots import meta
from tt_ckpt.tensor_file import TensorSpec, spec_of
from tt_ckpt.weights import EMBEDDING, OUTPUT, Weights, number, positive, rotated_heads, specs_of

FAMILIES = ("llama", "mistral")
_LAYER = "model.layers.{}."

RENAME = Rename(
    {
        EMBEDDING: "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        OUTPUT: "output.weight",
        _LAYER + "input_layernorm.weight": "layers.{}.attention_norm.weight",
        _LAYER + "post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
        _LAYER + "self_attn.q_proj.weight": "layers.{}.attention.wq.weight",
        _LAYER + "self_attn.k_proj.weight": "layers.{}.attention.wk.weight",
        _LAYER + "self_attn.v_proj.weight": "layers.{}.attention.wv.weight",
        _LAYER + "self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
        _LAYER + "mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
        _LAYER + "mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
        _LAYER + "mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    },
    what="a Meta checkpoint",
)
QUERY = "model.layers.0.self_attn.q_proj.weight"
IGNORED = ("rope.freqs",)
_SPLIT_ROWS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", OUTPUT)
_SPLIT_COLUMNS = ("o_proj.weight", "down_proj.weight")
_LLAMA3_VOCAB = 100_000  # from Llama 3 on the vocabulary is larger, and the embedding is split by rows, not columns


def from_meta(
    parts: Sequence[Mapping[str, Tensor]],
    *,
    params: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    files: Sequence[Path],
) -> Weights:
    """The model in ``parts`` under Hugging Face names. ``config`` (a config.json) wins over ``params``."""
    for file, part in zip(files, parts, strict=True):
        if part.keys() != parts[0].keys():
            odd = sorted(part.keys() ^ parts[0].keys())[0]
            raise ValueError(f"{file}: {odd} is not in every part; download it again")
    keys = {RENAME.back(key): key for key in parts[0] if key not in IGNORED}
    known = [specs_of(part) for part in parts]
    if config is None and params is None:
        raise ValueError(f"{files[0].parent}: neither params.json nor config.json tells the shape; give config=DIR")
    where = files[0].parent / "params.json"
    hidden = positive(params or {}, "dim", where=where) if config is None else positive(config, "hidden_size")

    def joined(name: str, pieces: list[Tensor]) -> Tensor:
        dim = _split_dim(name, pieces[0].shape, hidden)
        return pieces[0] if dim is None or len(pieces) == 1 else torch.cat(pieces, dim)

    _check_parts(parts, keys, hidden, files)
    shapes = {name: spec_of(joined(name, [meta(specs[key]) for specs in known])) for name, key in keys.items()}
    if config is None:
        assert params is not None
        config = config_from_params(params, shapes, _is_tied(parts, keys, joined), files[0])
    heads = rotated_heads(config)
    rows = shapes[QUERY].shape[0] if QUERY in shapes else 0
    expected = heads["q_proj"] * positive(config, "head_dim", default=hidden // heads["q_proj"])
    if rows != expected:
        raise ValueError(
            f"{files[0].parent}: {len(parts)} parts with {rows} query rows, not {expected}; parts missing?"
        )

    def get(name: str) -> Tensor:
        whole = joined(name, [part[keys[name]] for part in parts])
        return to_half_split(whole, heads[name.rsplit(".", 2)[1]]) if _is_rotated(name) else whole

    return Weights(specs=shapes, get=get, config=dict(config), format="meta", files=tuple(files))


def _check_parts(
    parts: Sequence[Mapping[str, Tensor]], keys: Mapping[str, str], hidden: int, files: Sequence[Path]
) -> None:
    """The embedding tells how many parts there must be, and that ``hidden`` is right."""
    shape = specs_of(parts[0])[keys[EMBEDDING]].shape if EMBEDDING in keys else ()
    if len(shape) != 2 or shape[1] not in (hidden, hidden / len(parts)):
        expected = f"; {hidden // shape[1]} parts are needed" if len(shape) == 2 and hidden % shape[1] == 0 else ""
        raise ValueError(
            f"{files[0]}: tok_embeddings.weight is {list(shape)}, which does not fit dim {hidden} in {len(parts)} parts"
            f"{expected}"
        )
    for file, part in zip(files[1:], parts[1:], strict=True):
        if torch.equal(part[keys[EMBEDDING]], parts[0][keys[EMBEDDING]]):
            raise ValueError(f"{file}: holds the same part as {files[0].name}; download it again")


def write_meta(
    weights: Weights, folder: Path, *, num_parts: int = 1, progress: Callable[[int], None] | None = None
) -> None:
    """Write ``consolidated.00.pth`` ... and ``params.json`` into ``folder``."""
    if weights.family not in FAMILIES:
        raise ValueError(f"model_type {weights.family!r} has no Meta format; families that do: {', '.join(FAMILIES)}")
    heads, hidden = rotated_heads(weights.config), positive(weights.config, "hidden_size")
    if num_parts < 1 or any(count % num_parts for count in heads.values()):
        raise ValueError(f"num_parts {num_parts} does not divide the heads {sorted(set(heads.values()))}")
    names = {RENAME.there(name): name for name in weights.specs}
    if weights.config.get("tie_word_embeddings"):
        names["output.weight"] = EMBEDDING  # the format has no ties

    def dim_of(key: str) -> int | None:
        return _split_dim(RENAME.back(key), None, hidden, vocab=positive(weights.config, "vocab_size"))

    def get(key: str, part: int) -> Tensor:
        name = names[key]
        tensor = weights.get(name)
        if _is_rotated(name):
            tensor = to_interleaved(tensor, heads[name.rsplit(".", 2)[1]])
        dim = dim_of(key)
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]

    for part in range(num_parts):
        specs = {}
        for key, name in names.items():
            whole, dim = meta(weights.specs[name]), dim_of(key)
            if dim is not None and whole.shape[dim] % num_parts:
                raise ValueError(f"{name} with shape {list(whole.shape)} cannot be divided into {num_parts} parts")
            specs[key] = spec_of(whole if dim is None else whole.chunk(num_parts, dim)[part])
        write_pickled(folder / f"consolidated.{part:02d}.pth", specs, partial(get, part=part), progress=progress)
    commit.write_json(folder / "params.json", params_from_config(weights.config))


def _is_rotated(name: str) -> bool:
    return name.endswith((".q_proj.weight", ".k_proj.weight"))


def _split_dim(name: str, shape: Sequence[int] | None, hidden: int, *, vocab: int = 0) -> int | None:
    """Along which dimension the parts of a tensor lie; None where each part has it whole."""
    if name.endswith(_SPLIT_ROWS):
        return 0
    if name.endswith(_SPLIT_COLUMNS):
        return 1
    if name == EMBEDDING:
        by_rows = shape[1] == hidden if shape is not None else vocab >= _LLAMA3_VOCAB
        return 0 if by_rows else 1
    return None


def _is_tied(
    parts: Sequence[Mapping[str, Tensor]],
    keys: Mapping[str, str],
    joined: Callable[[str, list[Tensor]], Tensor],
) -> bool:
    """Whether output and embedding are equal: the format has no flag for it."""
    if OUTPUT not in keys:
        return True
    embedding, output = (joined(name, [part[keys[name]] for part in parts]) for name in (EMBEDDING, OUTPUT))
    return embedding.shape == output.shape and torch.equal(embedding, output)


# ---- params.json -----------------------------------------------------------------------------------------------------


def config_from_params(
    params: Mapping[str, Any], specs: Mapping[str, TensorSpec], tied: bool, file: Path
) -> dict[str, Any]:
    """A ``config.json`` from ``params.json`` and the shapes. ``max_position_embeddings`` is a guess by generation."""
    where = file.parent / "params.json"
    mistral = "hidden_dim" in params
    heads = positive(params, "n_heads", where=where)
    theta = number(params, "rope_theta", default=10_000.0, where=where)
    vocab = specs[EMBEDDING].shape[0]
    llama3 = vocab >= _LLAMA3_VOCAB
    gate = "model.layers.0.mlp.gate_proj.weight"
    if gate not in specs:
        raise ValueError(f"{file}: holds no layers.0.feed_forward.w1.weight")
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128_000 if llama3 else 1,
        "eos_token_id": 128_001 if llama3 else 2,
        "hidden_act": "silu",
        "hidden_size": positive(params, "dim", where=where),
        "intermediate_size": specs[gate].shape[0],
        "max_position_embeddings": _positions(params, theta, mistral, where),
        "model_type": "mistral" if mistral else "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": positive(params, "n_layers", where=where),
        "num_key_value_heads": positive(params, "n_kv_heads", default=heads, where=where),
        "rms_norm_eps": number(params, "norm_eps", default=1e-5, where=where),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": str(specs[EMBEDDING].dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    if mistral and params.get("sliding_window"):
        config["sliding_window"] = positive(params, "sliding_window", where=where)
    if params.get("head_dim"):
        config["head_dim"] = positive(params, "head_dim", where=where)
    if params.get("use_scaled_rope"):
        factor = 32.0 if tied else 8.0  # the small models of 3.2 are the tied ones
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": number(params, "rope_scaling_factor", default=factor, where=where),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


def _positions(params: Mapping[str, Any], theta: float, mistral: bool, where: Path) -> int:
    if params.get("max_seq_len"):
        return positive(params, "max_seq_len", where=where)
    if mistral:
        return 32_768
    if params.get("use_scaled_rope"):
        return 131_072
    return {500_000.0: 8192, 1_000_000.0: 16_384}.get(theta, 4096)


def params_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``params.json`` for a ``config.json`` of either generation (``rope_theta`` or ``rope_parameters``)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters: expected an object, found {rope!r}")
    heads, hidden = positive(config, "num_attention_heads"), positive(config, "hidden_size")
    params: dict[str, Any] = {
        "dim": hidden,
        "n_layers": positive(config, "num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": positive(config, "num_key_value_heads", default=heads),
        "vocab_size": positive(config, "vocab_size"),
        "norm_eps": number(config, "rms_norm_eps"),
        "rope_theta": number(rope, "rope_theta", default=number(config, "rope_theta", default=10_000.0)),
    }
    head_dim = positive(config, "head_dim", default=hidden // heads)
    if config["model_type"] == "mistral":
        params |= {"hidden_dim": positive(config, "intermediate_size"), "head_dim": head_dim}
        params |= {"sliding_window": config["sliding_window"]} if config.get("sliding_window") else {}
    else:
        params |= feed_forward_params(hidden, positive(config, "intermediate_size"))
        params |= {"head_dim": head_dim} if head_dim * heads != hidden else {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": number(rope, "factor")}
    elif kind not in (None, "default"):
        raise ValueError(f"rope type {kind!r} cannot be said in params.json; it knows default and llama3")
    return params


def feed_forward_params(hidden: int, intermediate: int) -> dict[str, Any]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that give ``intermediate`` by Meta's rule."""
    base = 8 * hidden // 3
    for multiple_of in (256, 1024, 4096):
        for multiplier in (None, 1.3, 1.5, 1.4, 1.2, 1.0):
            size = base if multiplier is None else int(multiplier * base)
            if -(-size // multiple_of) * multiple_of == intermediate:
                return {"multiple_of": multiple_of} | ({"ffn_dim_multiplier": multiplier} if multiplier else {})
    return {"multiple_of": 1, "ffn_dim_multiplier": (intermediate + 0.5) / base}
