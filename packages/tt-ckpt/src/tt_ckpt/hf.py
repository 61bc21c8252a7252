"""Writing a Hugging Face model directory that transformers loads, read back before it is there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt import commit
from tt_ckpt.directory import check_destination, copy_companions, publish, resolve, write_config
from tt_ckpt.names import check_basename
from tt_ckpt.shards import INDEX_NAME, OpenShards, encode_index, find_shards, parse_size, read_json, split
from tt_ckpt.slots import find_slots, meta
from tt_ckpt.slots import split as split_parameter
from tt_ckpt.tensor_file import TensorSpec, canonical_order, spec_of, write_tensors
from tt_ckpt.weights import Weights, compare

LAYOUT_NAME = "hf_layout.json"  # in directories of other formats: how the Hugging Face files lay, to write them again


def save_hf(
    model: nn.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any],
    source: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``model``'s base weights as a Hugging Face directory: safetensors shards, index, ``config.json``.

    ``source``: a model directory (or hub id) whose tokenizer, template, generation and license files are copied, and
    whose shards and header order are kept when the tensors' names, shapes and dtypes are the same: an unchanged model
    is written byte for byte. ``dtype`` casts floating weights. Adapter parameters are not written: merge first.

    What was written is read back and compared; ``progress(done, total)`` counts bytes, each twice.
    The directory appears whole or not at all. One that holds weights already is a FileExistsError unless ``overwrite``.
    """
    folder, origin = Path(path), None if source is None else resolve(source)
    pieces = _pieces(model, dtype)
    weights = Weights(
        specs={key: spec for key, (spec, _) in pieces.items()},
        get=lambda key: pieces[key][1](),
        config=dict(config),
        format="hf",
        files=(),
    )
    old = check_destination(folder, overwrite=overwrite)
    tmp = commit.make_tmp(folder)
    try:
        advance = counter(progress, 2 * weights.nbytes)
        write_shards(weights, tmp, None if origin is None else read_layout(origin), max_shard_size, advance)
        compare(open_hf(tmp, {}), weights, where=folder, progress=advance)
        write_config(tmp / "config.json", config, weights.specs, origin)
        if origin is not None:
            copy_companions(origin, tmp)
        publish(tmp, folder, old)
    finally:
        commit.remove_tree(tmp)


def _pieces(model: nn.Module, dtype: torch.dtype | None) -> dict[str, tuple[TensorSpec, Callable[[], Tensor]]]:
    """File key -> what it will be, and how to make it when its turn comes."""
    found: dict[str, tuple[TensorSpec, Callable[[], Tensor]]] = {}
    for slot in find_slots(model):
        tensor, name = slot.tensor, slot.name
        if tensor.device.type == "meta":
            raise ValueError(f"parameter {name} is on the meta device: load weights before saving")
        if type(tensor.data) is not Tensor:
            raise ValueError(f"parameter {name} is a {type(tensor.data).__name__}: merge or dequantize before saving")
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for key, piece in split_parameter(model, name, meta(spec_of(tensor))).items():

            def make(key: str = key, name: str = name, tensor: Tensor = tensor, kind: torch.dtype = kind) -> Tensor:
                return split_parameter(model, name, tensor.detach())[key].to(kind)

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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How tensors lie in files: names of files, keys in the order of their bytes, metadata, the text of the index."""

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str] | None]
    index: str | None

    def fits(self, specs: Mapping[str, TensorSpec], max_shard_size: str | int) -> bool:
        """Whether exactly these tensors can lie so, within the limit."""
        keys = [key for held in self.files.values() for key in held]
        limit = parse_size(max_shard_size)
        return sorted(keys) == sorted(specs) and all(
            len(held) <= 1 or sum(specs[key].nbytes for key in held) <= limit for held in self.files.values()
        )


def read_layout(directory: Path) -> Layout | None:
    """The layout of a Hugging Face directory, or the one remembered in a converted one; None where neither is sound."""
    try:
        if (directory / LAYOUT_NAME).exists():
            return _parse_layout(directory / LAYOUT_NAME)
        shards = find_shards(directory)
    except (FileNotFoundError, ValueError):
        return None
    return Layout(
        files={name: list(header.tensors) for name, header in shards.files.items()},
        metadata={name: header.metadata for name, header in shards.files.items()},
        index=(directory / INDEX_NAME).read_text("utf-8") if shards.index is not None else None,
    )


def _parse_layout(path: Path) -> Layout:
    value = read_json(path)
    try:
        files = {check_basename(name, where=path): [str(key) for key in keys] for name, keys in value["files"].items()}
        metadata = {name: value["metadata"][name] for name in files}
        sound = all(name.endswith(".safetensors") for name in files) and isinstance(value["index"], str | None)
        sound = sound and all(entry is None or isinstance(entry, dict) for entry in metadata.values())
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged; remove it")
    return Layout(files=files, metadata=metadata, index=value["index"])


def write_layout(layout: Layout, folder: Path) -> None:
    """Remember a layout beside another format. Not JSON by sorted keys: the order of keys is what is kept."""
    value = {"files": layout.files, "metadata": layout.metadata, "index": layout.index}
    commit.write_bytes(folder / LAYOUT_NAME, json.dumps(value).encode())


def write_shards(
    weights: Weights,
    folder: Path,
    layout: Layout | None,
    max_shard_size: str | int,
    advance: Callable[[int], None],
) -> None:
    """Write the safetensors files and their index: as ``layout`` says where it fits, else split anew."""
    specs = weights.specs
    if layout is not None and layout.fits(specs, max_shard_size):
        for name, keys in layout.files.items():
            held = {key: specs[key] for key in keys}
            write_tensors(folder / name, held, weights.get, metadata=layout.metadata[name], progress=advance)
        if layout.index is not None:
            commit.write_bytes(folder / INDEX_NAME, layout.index.encode())
        return
    files = split(specs, max_shard_size)
    for name, keys in files.items():
        held = {key: specs[key] for key in keys}
        ordered = {key: held[key] for key in canonical_order(held)}
        write_tensors(folder / name, ordered, weights.get, metadata={"format": "pt"}, progress=advance)
    if len(files) > 1:
        commit.write_bytes(folder / INDEX_NAME, encode_index(files, specs).encode())


def counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """``progress(done, total)`` from a call per piece."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(min(done, total), total)

    return advance
