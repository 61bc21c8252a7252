"""Writing a Hugging Face model directory that transformers loads. It is read back before it appears.

The tensors are split over files as the source has them if they fit, else by the rule of huggingface_hub, so that the
files are the same as those that transformers writes.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt import commit, ranks
from tt_ckpt.files import copy, read_text
from tt_ckpt.hf.base_tensors import base_tensors, meta, split_sources
from tt_ckpt.hf.directory import copy_companions, new_directory, write_config
from tt_ckpt.hf.stored_tensors import INDEX_NAME, SINGLE_NAME, open_tensors
from tt_ckpt.hf.weights import Weights, cast_pieces, cast_tensor, compare, in_pieces
from tt_ckpt.model_path import resolve
from tt_ckpt.ranks import is_dtensor
from tt_ckpt.safe_names import check_basename, from_home
from tt_ckpt.safetensors_file import TensorSpec, canonical_order, spec_of, write_tensors
from tt_ckpt.shown import UNITS


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
    """Write the base weights of ``model`` as a Hugging Face directory: safetensors shards, index, ``config.json``.

    ``source``: a model directory or hub id. Its tokenizer, template, generation and license files are copied. Its
    shards and the order of its tensors are kept if the names, shapes and dtypes of the tensors are the same, so that an
    unchanged model is written byte for byte. ``dtype`` casts floating-point weights: all to one dtype, or each to its
    own by its name in the files (``tensor_dtypes(base)``; a name that is not in it keeps its dtype). Adapter parameters
    are not written: merge first. ``files``: name -> text, or the file or folder to copy, in place of the source's file
    of that name, such as a chat template. None: leave out the source's file.

    The result is read back and compared. ``progress(done, total)`` counts bytes, each twice. A model that is sharded
    over ranks is gathered tensor by tensor: every rank must call this, and rank 0 writes. The directory appears whole
    or not at all. FileExistsError if it has weights already, unless ``overwrite``.
    """
    folder, origin = from_home(path), None if source is None else resolve(source)
    weights = weights_of(model, dtype, config)
    layout = choose_layout([] if origin is None else [origin], weights.specs, max_shard_size)

    def write(weights: Weights) -> None:
        save_weights(weights, folder, layout, source=origin, overwrite=overwrite, files=files, progress=progress)

    if any(map(is_dtensor, model.parameters())):
        order = [key for keys in layout.files.values() for key in keys]
        _write_together(weights, 2 * order, write)  # written in this order, and read back in it
    else:
        write(weights)


def save_weights(
    weights: Weights,
    folder: Path,
    layout: "Layout",
    *,
    source: Path | None,
    overwrite: bool = False,
    files: Mapping[str, str | Path | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``save_hf`` without a model: each tensor is asked for twice, to write it and to compare it."""
    with new_directory(folder, weights.nbytes, overwrite=overwrite) as tmp:
        write_config(tmp / "config.json", weights.config, weights.specs, source)  # what can fail on its own: first
        for name, content in (files or {}).items():
            place = tmp / check_basename(name, where="save_hf(files=...)")
            if isinstance(content, str):
                commit.write_bytes(place, content.encode())
            elif content is not None:
                copy(content, place)
        if source is not None:
            copy_companions(source, tmp, leave=files or {})
        advance = counter(progress, 2 * weights.nbytes) if progress else None
        write_shards(weights, tmp, layout, advance)
        written = open_tensors(tmp)  # read, not mapped: mapped pages would count as memory of this process
        again = replace(weights, specs=written.specs, get=written.borrow, pieces=written.pieces)
        compare(again, weights, where=folder, progress=advance)


def weights_of(
    model: nn.Module, dtype: torch.dtype | Mapping[str, torch.dtype] | None, config: Mapping[str, Any]
) -> Weights:
    """The base tensors of ``model`` under the names in the files; each is split, gathered and cast when it is read."""
    specs: dict[str, TensorSpec] = {}
    origin: dict[str, str] = {}  # name in the files -> its parameter's
    tensors: dict[str, Tensor] = {}
    for base in base_tensors(model):
        tensor, name = base.tensor, base.names[0]
        if tensor.device.type == "meta":
            raise ValueError(f"parameter {name} is on the meta device: load weights before saving")
        if type(tensor.data) is not Tensor and not is_dtensor(tensor):
            raise ValueError(f"parameter {name} is a {type(tensor.data).__name__}: merge or dequantize before saving")
        tensors[name] = tensor
        for key, piece in split_sources(model, name, meta(spec_of(tensor))).items():
            asked = dtype.get(key, dtype.get(name)) if isinstance(dtype, Mapping) else dtype
            kind = asked if asked is not None and tensor.is_floating_point() else tensor.dtype
            specs[key], origin[key] = TensorSpec(dtype=kind, shape=tuple(piece.shape)), name

    @lru_cache(maxsize=2)  # in the order of the files the two stacks of a layer's experts take turns
    def parts(name: str) -> dict[str, Tensor]:
        whole = tensors[name].detach()
        return split_sources(model, name, whole.full_tensor() if is_dtensor(whole) else whole)

    def get(key: str) -> Tensor:
        return cast_tensor(key, parts(origin[key])[key], specs[key].dtype)

    def pieces(key: str) -> Iterator[Tensor]:
        return cast_pieces(key, lambda: in_pieces(parts(origin[key])[key]), specs[key].dtype)

    return Weights(specs=specs, get=get, pieces=pieces, config=dict(config), format="hf", files=())


def _write_together(weights: Weights, order: list[str], write: Callable[[Weights], None]) -> None:
    """Run ``write`` on rank 0 while all ranks read the tensors in ``order`` with it. Its failure is raised on all.

    Reading a tensor of a sharded model is a collective: every rank must read the same ones in the same order.
    """
    among = ranks.current()
    position = 0

    def get(key: str) -> Tensor:
        nonlocal position
        assert key == order[position], "tensors must be read in the order that was announced"
        position += 1
        return weights.get(key)

    failure: Exception | None = None
    if among.is_first:
        try:
            write(replace(weights, get=get, pieces=lambda key: in_pieces(get(key))))
        except Exception as error:
            failure = error
    for key in order[position:]:  # also after a failure: the other ranks are waiting in these reads
        weights.get(key)
    failure = among.from_first(failure)
    if failure is not None:
        raise failure


# ---- the files -------------------------------------------------------------------------------------------------------


def stored_weights(folder: Path, config: Mapping[str, Any]) -> Weights:
    """The safetensors files of a directory."""
    tensors = open_tensors(folder)

    def get(name: str) -> Tensor:
        tensors.release()  # the pages of the tensor before
        return tensors.mapped(name)

    return Weights(
        specs=tensors.specs,
        get=get,
        pieces=tensors.pieces,
        config=dict(config),
        format="hf",
        files=tuple(header.path for header in tensors.headers.values()),
    )


def write_shards(weights: Weights, folder: Path, layout: "Layout", advance: Callable[[int], None] | None) -> None:
    """Write the safetensors files of a layout and their index."""
    for name, keys in layout.files.items():
        held = {key: weights.specs[key] for key in keys}
        write_tensors(folder / name, held, weights.pieces, metadata=layout.metadata[name], progress=advance)
    if layout.index is not None:
        commit.write_bytes(folder / INDEX_NAME, layout.index.encode())


def counter(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A function that adds up bytes and calls ``progress(done, total)``."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, total), total)

    return advance


# ---- how tensors are split over files --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """File name -> the names of its tensors in the order of their bytes; its metadata; and the text of the index."""

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str] | None]
    index: str | None


def choose_layout(origins: Iterable[Path], specs: Mapping[str, TensorSpec], max_shard_size: str | int) -> Layout:
    """The first layout found in ``origins``, if its tensors are these and it keeps the limit; else a new one."""
    limit = parse_size(max_shard_size)
    for kept in filter(None, map(read_layout, origins)):
        held = list(kept.files.values())
        same = sorted(key for keys in held for key in keys) == sorted(specs)
        if same and all(len(keys) <= 1 or sum(specs[key].nbytes for key in keys) <= limit for keys in held):
            return kept
        break
    files = split(specs, limit)
    return Layout(
        files={name: canonical_order({key: specs[key] for key in keys}) for name, keys in files.items()},
        metadata={name: {"format": "pt"} for name in files},
        index=encode_index(files, specs) if len(files) > 1 else None,
    )


def read_layout(directory: Path) -> Layout | None:
    """The layout of a Hugging Face directory; None if its files are not whole, or if they lack an index."""
    try:
        tensors = open_tensors(directory)
    except (FileNotFoundError, ValueError):
        return None
    if not tensors.has_index and len(tensors.headers) > 1:
        return None
    return Layout(
        files={name: list(header.tensors) for name, header in tensors.headers.items()},
        metadata={name: header.metadata for name, header in tensors.headers.items()},
        index=read_text(directory / INDEX_NAME) if tensors.has_index else None,
    )


def parse_size(size: str | int) -> int:
    """``"5GB"`` -> 5_000_000_000. An integer is a number of bytes."""
    if isinstance(size, int):
        number, unit = float(size), 1
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]B)\s*", size, re.IGNORECASE)
        if match is None or match[1].count(".") > 1:
            raise ValueError(f"max_shard_size: expected a number with KB, MB, GB or TB such as '5GB', got {size!r}")
        number, unit = float(match[1]), UNITS[match[2].upper()]
    if number <= 0 or not math.isfinite(number):
        raise ValueError(f"max_shard_size: expected more than 0, got {size!r}")
    return int(number * unit)


def split(specs: Mapping[str, TensorSpec], limit: int) -> dict[str, list[str]]:
    """File name -> names of tensors, filled in the given order. A tensor above the limit gets its own file."""
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for key, spec in specs.items():
        if spec.nbytes > limit:
            groups.append([key])
            continue
        if filled + spec.nbytes > limit:
            groups.append(current)
            current, filled = [], 0
        current.append(key)
        filled += spec.nbytes
    if current:
        groups.append(current)
    if len(groups) <= 1:
        return {SINGLE_NAME: groups[0] if groups else []}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def encode_index(files: Mapping[str, Iterable[str]], specs: Mapping[str, TensorSpec]) -> str:
    """The text of ``model.safetensors.index.json``, as transformers writes it."""
    total = {
        "total_parameters": sum(spec.numel for spec in specs.values()),
        "total_size": sum(spec.nbytes for spec in specs.values()),
    }
    where = {key: name for name, keys in files.items() for key in keys}
    return json.dumps({"metadata": total, "weight_map": where}, indent=2, sort_keys=True) + "\n"
