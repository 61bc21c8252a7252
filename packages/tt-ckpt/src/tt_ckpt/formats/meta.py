"""Meta's directories: ``consolidated.NN.pth`` (one part per model-parallel rank) with ``params.json``.

Mistral publishes in this form too: ``consolidated.safetensors`` with its own ``params.json``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt import commit
from tt_ckpt.formats.meta_params import LLAMA3_VOCAB, config_from_params, params_from_config
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
from tt_ckpt.shown import plain

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


def from_meta(
    parts: Sequence[Mapping[str, Tensor]],
    *,
    params: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    files: Sequence[Path],
) -> Weights:
    """The model in ``parts`` under Hugging Face names. ``config`` (a config.json) counts before ``params``."""
    for file, part in zip(files, parts, strict=True):
        if part.keys() != parts[0].keys():
            odd = sorted(part.keys() ^ parts[0].keys())[0]
            raise ValueError(f"{file}: {plain(odd)} is not in every part; download it again")
    keys = {RENAME.back(key, files[0]): key for key in parts[0] if key not in IGNORED}
    known = [specs_of(part) for part in parts]
    if config is None and params is None:
        raise ValueError(f"{files[0].parent}: neither params.json nor config.json states the sizes; give config=DIR")
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
        found = f"{len(parts)} parts with {rows} query rows"
        raise ValueError(f"{files[0].parent}: {found}, not {expected}; parts missing?")

    def get(name: str) -> Tensor:
        whole = joined(name, [part[keys[name]] for part in parts])
        if not _is_rotated(name):
            return whole
        return to_half_split(whole, heads[name.rsplit(".", 2)[1]], f"{files[0]}: {name}")

    def pieces(name: str) -> Iterator[Tensor]:
        return in_pieces(get(name)) if len(parts) > 1 or _is_rotated(name) else pieces_of(parts[0], keys[name])

    return Weights(specs=shapes, get=get, pieces=pieces, config=dict(config), format="meta", files=tuple(files))


def _check_parts(
    parts: Sequence[Mapping[str, Tensor]], keys: Mapping[str, str], hidden: int, files: Sequence[Path]
) -> None:
    """ValueError if the embedding shows that parts are missing or doubled, or that ``hidden`` is wrong."""
    shape = specs_of(parts[0])[keys[EMBEDDING]].shape if EMBEDDING in keys else ()
    if len(shape) != 2 or shape[1] not in (hidden, hidden / len(parts)):
        divides = len(shape) == 2 and shape[1] and hidden % shape[1] == 0
        expected = f"; {hidden // shape[1]} parts are needed" if divides else ""
        raise ValueError(
            f"{files[0]}: tok_embeddings.weight is {list(shape)}, which does not fit dim {hidden} in {len(parts)} parts"
            f"{expected}"
        )
    for file, part in zip(files[1:], parts[1:], strict=True):
        if torch.equal(part[keys[EMBEDDING]], parts[0][keys[EMBEDDING]]):
            raise ValueError(f"{file}: contains the same part as {files[0].name}; download it again")


def write_meta(
    weights: Weights, folder: Path, *, num_parts: int = 1, progress: Callable[[int], None] | None = None
) -> None:
    """Write ``consolidated.00.pth`` ... and ``params.json`` into ``folder``."""
    heads, hidden = rotated_heads(weights.config), positive(weights.config, "hidden_size")
    if num_parts < 1 or any(count % num_parts for count in heads.values()):
        counts = sorted(set(heads.values()))
        raise ValueError(f"num_parts {num_parts} does not divide the heads {counts}; choose one that does")
    file = weights.files[0] if weights.files else None
    names = {RENAME.there(name, file): name for name in weights.specs}
    if weights.config.get("tie_word_embeddings"):
        names["output.weight"] = EMBEDDING  # the format has no ties

    def dim_of(key: str) -> int | None:
        return _split_dim(RENAME.back(key), None, hidden, vocab=positive(weights.config, "vocab_size"))

    def get(key: str, part: int) -> Iterator[Tensor]:
        name = names[key]
        if not _is_rotated(name) and (num_parts == 1 or dim_of(key) is None):
            return weights.pieces(name)
        tensor = weights.get(name)
        if _is_rotated(name):
            tensor = to_interleaved(tensor, heads[name.rsplit(".", 2)[1]], name)
        dim = dim_of(key)
        return in_pieces(tensor if dim is None else tensor.chunk(num_parts, dim)[part])

    for part in range(num_parts):
        specs = {}
        for key, name in names.items():
            whole, dim = meta(weights.specs[name]), dim_of(key)
            if dim is not None and whole.shape[dim] % num_parts:
                shape = list(whole.shape)
                raise ValueError(f"{name} with shape {shape} cannot be divided into {num_parts} parts; choose fewer")
            specs[key] = spec_of(whole if dim is None else whole.chunk(num_parts, dim)[part])
        write_pickled(folder / f"consolidated.{part:02d}.pth", specs, partial(get, part=part), progress=progress)
    commit.write_json(folder / "params.json", params_from_config(weights.config))


def _is_rotated(name: str) -> bool:
    return name.endswith((".q_proj.weight", ".k_proj.weight"))


def _split_dim(name: str, shape: Sequence[int] | None, hidden: int, *, vocab: int = 0) -> int | None:
    """The dimension along which a tensor is split into parts; None if each part has all of it."""
    if name.endswith(_SPLIT_ROWS):
        return 0
    if name.endswith(_SPLIT_COLUMNS):
        return 1
    if name == EMBEDDING:
        by_rows = shape[1] == hidden if shape is not None else vocab >= LLAMA3_VOCAB  # from Llama 3 on
        return 0 if by_rows else 1
    return None


def _is_tied(
    parts: Sequence[Mapping[str, Tensor]],
    keys: Mapping[str, str],
    joined: Callable[[str, list[Tensor]], Tensor],
) -> bool:
    """Whether output and embedding are equal. The format has no flag for it."""
    if OUTPUT not in keys:
        return True
    if len(parts) == 1:
        embedding, output = (pieces_of(parts[0], keys[name]) for name in (EMBEDDING, OUTPUT))
    else:
        embedding, output = (
            in_pieces(joined(name, [part[keys[name]] for part in parts])) for name in (EMBEDDING, OUTPUT)
        )
    return all(
        ours is not None and theirs is not None and torch.equal(ours, theirs)
        for ours, theirs in zip_longest(embedding, output)
    )
