"""Writing a Hugging Face model directory that transformers loads, read back before it is there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt import commit
from tt_ckpt.hf.directory import (
    check_destination,
    check_room,
    copy_companions,
    make_tmp,
    publish,
    put_file,
    resolve,
    write_config,
)
from tt_ckpt.hf.dtensors import gathered, is_spread, write_together
from tt_ckpt.hf.layout import Layout, choose_layout, read_layout
from tt_ckpt.hf.parameters import find_slots, meta
from tt_ckpt.hf.parameters import split as split_parameter
from tt_ckpt.hf.shards import INDEX_NAME, OpenShards, find_shards
from tt_ckpt.hf.weights import Weights, cast_tensor, compare
from tt_ckpt.safe_names import check_basename
from tt_ckpt.safetensors_file import TensorSpec, spec_of, write_tensors


def save_hf(
    model: nn.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any],
    source: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    overwrite: bool = False,
    files: Mapping[str, str | Path | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``model``'s base weights as a Hugging Face directory: safetensors shards, index, ``config.json``.

    ``source``: a model directory (or hub id) whose tokenizer, template, generation and license files are copied, and
    whose shards and header order are kept when the tensors' names, shapes and dtypes are the same: an unchanged model
    is written byte for byte. ``dtype`` casts floating weights, all to one, or each to its own by its name in the files
    (``tensor_dtypes(base)``; a name not in it keeps its dtype). Adapter parameters are not written: merge first.
    ``files``: name to text, or to a file or folder to copy, instead of what ``source`` has by that name (a chat
    template); to None: no such file, although ``source`` has one.

    What was written is read back and compared; ``progress(done, total)`` counts bytes, each twice.
    A model that is sharded over ranks is gathered tensor by tensor; every rank must call, rank 0 writes.
    The directory appears whole or not at all. One that holds weights already is a FileExistsError unless ``overwrite``.
    """
    folder, origin = Path(path).expanduser(), None if source is None else resolve(source)
    weights = _weights_of(model, dtype, config)
    layout = choose_layout(None if origin is None else read_layout(origin), weights.specs, max_shard_size)

    def write(weights: Weights) -> None:
        old = check_destination(folder, overwrite=overwrite)
        check_room(folder, weights.nbytes)
        tmp = make_tmp(folder)
        try:
            write_config(tmp / "config.json", config, weights.specs, origin)  # what can fail for its own reasons: first
            for name, found in (files or {}).items():
                put_file(tmp / check_basename(name, where="save_hf(files=...)"), found)
            if origin is not None:
                copy_companions(origin, tmp, leave=files or {})
            advance = counter(progress, 2 * weights.nbytes)
            write_shards(weights, tmp, layout, advance)
            compare(open_hf(tmp, {}), weights, where=folder, progress=advance)
            publish(tmp, folder, old, overwrite=overwrite)
        finally:
            commit.remove_tree(tmp)

    if not is_spread(model):
        write(weights)
        return
    order = [key for keys in layout.files.values() for key in keys]
    write_together(weights, 2 * order, write)  # written in this order, and read back in it


def _weights_of(
    model: nn.Module, dtype: torch.dtype | Mapping[str, torch.dtype] | None, config: Mapping[str, Any]
) -> Weights:
    pieces = _pieces(model, dtype)
    return Weights(
        specs={key: spec for key, (spec, _) in pieces.items()},
        get=lambda key: pieces[key][1](),
        config=dict(config),
        format="hf",
        files=(),
    )


def _pieces(
    model: nn.Module, dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> dict[str, tuple[TensorSpec, Callable[[], Tensor]]]:
    """File key -> what it will be, and how to make it when its turn comes."""
    found: dict[str, tuple[TensorSpec, Callable[[], Tensor]]] = {}
    for slot in find_slots(model):
        tensor, name = slot.tensor, slot.name
        if tensor.device.type == "meta":
            raise ValueError(f"parameter {name} is on the meta device: load weights before saving")
        if type(tensor.data) is not Tensor and not hasattr(tensor, "full_tensor"):
            raise ValueError(f"parameter {name} is a {type(tensor.data).__name__}: merge or dequantize before saving")
        for key, piece in split_parameter(model, name, meta(spec_of(tensor))).items():
            asked = dtype.get(key, dtype.get(name)) if isinstance(dtype, Mapping) else dtype
            kind = asked if asked is not None and tensor.is_floating_point() else tensor.dtype

            def make(key: str = key, name: str = name, tensor: Tensor = tensor, kind: torch.dtype = kind) -> Tensor:
                return cast_tensor(key, split_parameter(model, name, gathered(tensor))[key], kind)

            found[key] = (TensorSpec(dtype=kind, shape=tuple(piece.shape)), make)
    return found


# ---- the files -----------------------------------------------------------------------------------------------------


def open_hf(folder: Path, config: Mapping[str, Any]) -> Weights:
    """The safetensors files of a directory."""
    shards = find_shards(folder)
    tensors = OpenShards(shards)
    return Weights(
        specs={key: shards.spec(key) for key in shards.where},
        get=tensors.__getitem__,
        config=dict(config),
        format="hf",
        files=tuple(header.path for header in shards.files.values()),
    )


def write_shards(weights: Weights, folder: Path, layout: Layout, advance: Callable[[int], None]) -> None:
    """Write the safetensors files of a layout and their index."""
    for name, keys in layout.files.items():
        held = {key: weights.specs[key] for key in keys}
        write_tensors(folder / name, held, weights.get, metadata=layout.metadata[name], progress=advance)
    if layout.index is not None:
        commit.write_bytes(folder / INDEX_NAME, layout.index.encode())


def counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """``progress(done, total)`` from a call per piece."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(min(done, total), total)

    return advance
