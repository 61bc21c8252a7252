"""torchtune's own format, 0.1 to 0.6: a file of tensors under its own names, beside config.json."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.formats.pickles import write_pickled
from tt_ckpt.formats.translation import (
    Rename,
    pieces_of,
    positive,
    rotated_heads,
    specs_of,
    to_half_split,
    to_interleaved,
)
from tt_ckpt.hf.base_tensors import meta
from tt_ckpt.hf.weights import EMBEDDING, OUTPUT, Weights, in_pieces
from tt_ckpt.safetensors_file import spec_of
from tt_ckpt.shown import quoted

FILE_NAME = "torchtune_model_0.pt"
_OURS, _THEIRS = "model.layers.{}.", "layers.{}."

_PROJECTIONS = {
    f"{_OURS}self_attn.{ours}.{kind}": f"{_THEIRS}attn.{theirs}.{kind}"
    for ours, theirs in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "output_proj"))
    for kind in ("weight", "bias")
}
_COMMON = {
    EMBEDDING: "tok_embeddings.weight",
    "model.norm.weight": "norm.scale",
    OUTPUT: "output.weight",
    **_PROJECTIONS,
    _OURS + "mlp.gate_proj.weight": _THEIRS + "mlp.w1.weight",
    _OURS + "mlp.down_proj.weight": _THEIRS + "mlp.w2.weight",
    _OURS + "mlp.up_proj.weight": _THEIRS + "mlp.w3.weight",
    _OURS + "input_layernorm.weight": _THEIRS + "sa_norm.scale",
}
_TWO_NORMS = _COMMON | {_OURS + "post_attention_layernorm.weight": _THEIRS + "mlp_norm.scale"}
_FOUR_NORMS = _COMMON | {
    "model.norm.weight": "norm.rms_norm.scale",
    _OURS + "post_attention_layernorm.weight": _THEIRS + "sa_scale.scale",
    # torchtune swaps these two (its mlp_norm is the norm before the MLP) in its files, so ours do too
    _OURS + "pre_feedforward_layernorm.weight": _THEIRS + "mlp_scale.scale",
    _OURS + "post_feedforward_layernorm.weight": _THEIRS + "mlp_norm.scale",
}
# Hugging Face keys that are several of torchtune's tensors, one below the other
_FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of a family's tensors there, whether q and k are interleaved, and which are fused in Hugging Face."""

    rename: Rename
    interleaved: bool = True
    fused: Mapping[str, tuple[str, ...]]


def _family(table: Mapping[str, str], *, interleaved: bool = True, fused: bool = False) -> Family:
    rename = Rename(table, what="a torchtune checkpoint")
    return Family(rename=rename, interleaved=interleaved, fused=_FUSED if fused else {})


FAMILIES = {
    "llama": _family(_TWO_NORMS),
    "mistral": _family(_TWO_NORMS),
    "gemma": _family(_TWO_NORMS),
    "gemma2": _family(_FOUR_NORMS),
    "qwen2": _family(_TWO_NORMS, interleaved=False),
    "phi3": _family(_TWO_NORMS, interleaved=False, fused=True),
}


def family_of(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = f"families that do: {', '.join(FAMILIES)}"
        raise ValueError(f"config.json: model_type {quoted(name)} has no torchtune format; {known}")
    return FAMILIES[name]


def from_torchtune(tensors: Mapping[str, Tensor], *, config: Mapping[str, Any], files: Sequence[Path]) -> Weights:
    """The model under Hugging Face names."""
    family, heads = family_of(config), rotated_heads(config)
    keys = {family.rename.back(key, files[0]): key for key in tensors}
    known = specs_of(tensors)

    def single(name: str) -> Tensor:
        tensor, where = tensors[keys[name]], f"{files[0]}: {name}"
        return to_half_split(tensor, heads[_projection(name)], where) if _is_rotated(name, family) else tensor

    parts = _group(keys, family)
    hollow = {name: [meta(known[keys[piece]]) for piece in pieces] for name, pieces in parts.items()}
    # torch.cat on meta imports much of torch: only if something is fused
    specs = {name: spec_of(ones[0] if len(ones) == 1 else torch.cat(ones)) for name, ones in hollow.items()}

    def get(name: str) -> Tensor:
        pieces = [single(piece) for piece in parts[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(name: str) -> Iterator[Tensor]:
        if len(parts[name]) > 1 or _is_rotated(name, family):
            return in_pieces(get(name))
        return pieces_of(tensors, keys[name])

    return Weights(specs=specs, get=get, pieces=pieces, config=dict(config), format="torchtune", files=tuple(files))


def _group(names: Mapping[str, str], family: Family) -> dict[str, tuple[str, ...]]:
    """Hugging Face key -> the unfused names that make it up."""
    grouped: dict[str, tuple[str, ...]] = {}
    for name in names:
        for fused, pieces in family.fused.items():
            match = next((piece for piece in pieces if name.endswith(piece)), None)
            if match is not None:
                prefix = name.removesuffix(match)
                grouped[prefix + fused] = tuple(prefix + piece for piece in pieces)
                break
        else:
            grouped[name] = (name,)
    absent = sorted(piece for pieces in grouped.values() for piece in pieces if piece not in names)
    if absent:
        raise ValueError(f"{family.rename.what} lacks {family.rename.there(absent[0])}")
    return grouped


def write_torchtune(weights: Weights, folder: Path, *, progress: Callable[[int], None] | None = None) -> None:
    """Write ``torchtune_model_0.pt`` into ``folder``, for its TorchTune checkpointer."""
    family, heads = family_of(weights.config), rotated_heads(weights.config)
    origin: dict[str, tuple[str, int, int]] = {}  # their key -> our key, its first row, its rows
    for name, spec in weights.specs.items():
        fused = next((fused for fused in family.fused if name.endswith(fused)), None)
        if fused is None:
            origin[family.rename.there(name, _file(weights))] = (name, 0, spec.shape[0])
            continue
        start, prefix = 0, name.removesuffix(fused)
        for piece, rows in zip(family.fused[fused], _rows(weights.config, fused), strict=True):
            origin[family.rename.there(prefix + piece)] = (name, start, rows)
            start += rows
        if start != spec.shape[0]:
            raise ValueError(f"{_file(weights)}: {name} has {spec.shape[0]} rows, its config.json says {start}")

    def get(key: str) -> Iterator[Tensor]:
        name, start, rows = origin[key]
        is_rotated = _is_rotated(name, family)
        if not is_rotated and rows == weights.specs[name].shape[0]:
            return weights.pieces(name)
        tensor = weights.get(name)[start : start + rows]
        return in_pieces(to_interleaved(tensor, heads[_projection(name)], name) if is_rotated else tensor)

    hollow = {name: meta(spec) for name, spec in weights.specs.items()}
    specs = {key: spec_of(hollow[name][start : start + rows]) for key, (name, start, rows) in origin.items()}
    write_pickled(folder / FILE_NAME, specs, get, progress=progress)


def _file(weights: Weights) -> Path | None:
    return weights.files[0] if weights.files else None


def _rows(config: Mapping[str, Any], fused: str) -> tuple[int, ...]:
    if "gate_up" in fused:
        return (positive(config, "intermediate_size"),) * 2
    heads = rotated_heads(config)
    head_dim = positive(config, "head_dim", default=positive(config, "hidden_size") // heads["q_proj"])
    return (heads["q_proj"] * head_dim, heads["k_proj"] * head_dim, heads["k_proj"] * head_dim)


def _projection(name: str) -> str:
    return name.rsplit(".", 2)[1]


def _is_rotated(name: str, family: Family) -> bool:
    return family.interleaved and _projection("." + name) in ("q_proj", "k_proj")
