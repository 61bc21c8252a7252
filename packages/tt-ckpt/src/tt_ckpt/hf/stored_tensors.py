"""The tensors in the safetensors files of a model directory: which there are, in which file, and reading them."""

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.files import DOWNLOAD, HALF_FETCHED, read_json
from tt_ckpt.hf.weights import rows_at_once
from tt_ckpt.mapped_file import MappedFile
from tt_ckpt.model_path import resolve
from tt_ckpt.safe_names import check_basename, safe_file
from tt_ckpt.safetensors_file import Header, read_header, read_pieces, read_tensor
from tt_ckpt.shown import counted, format_size, listed, quoted

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model directory by name, each read into new memory when it is asked for.

    ``specs[name]`` has its ``dtype``, ``shape``, ``numel`` and ``nbytes``, ``file_of(name)`` is its file.
    Files are opened when a tensor is read and closed again. ``dict(tensors)`` reads the whole model.
    """

    def __init__(self, directory: Path, headers: dict[str, Header], where: dict[str, str], *, has_index: bool) -> None:
        self.directory = directory
        self.headers = headers  # file name -> header
        self.where = where  # tensor name -> file name
        self.has_index = has_index
        self.specs = {name: headers[file].tensors[name] for name, file in where.items()}
        self._maps: dict[str, MappedFile] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        out = torch.empty(spec.shape, dtype=spec.dtype)
        read_tensor(self.headers[self.where[name]], name, out)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def file_of(self, name: str) -> Path:
        return self.headers[self.where[name]].path

    def offset_of(self, name: str) -> int:
        """Where the tensor begins in its file, in bytes."""
        return self.headers[self.where[name]].offsets[name]

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out``, which has the tensor's shape, cast to its dtype and moved to its device."""
        read_tensor(self.headers[self.where[name]], name, out)

    def borrow(self, name: str) -> Tensor:
        """The tensor in memory that the next call of ``borrow`` overwrites."""
        spec = self.specs[name]
        if self._buffer.numel() < spec.nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is allocated
            self._buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        out = self._buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)
        read_tensor(self.headers[self.where[name]], name, out)
        return out

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor as ``in_pieces`` gives it, each piece in memory that the next one overwrites."""
        step, width = rows_at_once(self.specs[name].shape)
        pieces = read_pieces(self.headers[self.where[name]], name, step * width)
        return (piece.view(-1, width) for piece in pieces)

    def mapped(self, name: str) -> Tensor:
        """The tensor as a view of a memory map, without a copy. Cutting the file short then ends the process."""
        file = self.where[name]
        if file not in self._maps:
            self._maps[file] = MappedFile(self.headers[file].path, self.headers[file])
        return self._maps[file].tensor(name)

    def release(self) -> None:
        """Drop the pages of all tensors that ``mapped`` has given from memory; they are read again if used again."""
        for file in self._maps.values():
            file.release()


def open_tensors(path: str | Path) -> StoredTensors:
    """The tensors in the safetensors files of a model directory or hub id. Only the index and headers are read.

    FileNotFoundError or ValueError, in one line, for what is missing or damaged. An index decides which tensors there
    are; those of its files that it does not name are left out, with a warning.
    """
    directory = resolve(path)
    index = None
    if os.path.lexists(directory / INDEX_NAME):
        index = read_json(directory / INDEX_NAME)
        names = _index_files(directory, index)
    elif os.path.lexists(directory / SINGLE_NAME):
        names = [SINGLE_NAME]
    else:  # perhaps a whole set without its index
        names = _whole_set(directory)
    if not names:
        raise FileNotFoundError(describe_no_weights(directory))
    headers = {name: read_header(directory / name, directory) for name in names}
    if index is not None:
        _check_index(directory, index["weight_map"], headers)
        return StoredTensors(directory, headers, index["weight_map"], has_index=True)
    where: dict[str, str] = {}
    for name, header in headers.items():
        for key in header.tensors:
            if key in where:
                both = f"{where[key]} and in {name}"
                raise ValueError(f"{directory}: tensor {quoted(key)} is in {both}; download {INDEX_NAME} too")
            where[key] = name
    return StoredTensors(directory, headers, where, has_index=False)


def tensor_dtypes(path: str | Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor in the safetensors files of a directory or hub id, by its name there.

    Only headers are read. ``save_hf(..., dtype=tensor_dtypes(base))`` writes a model with the dtypes of its base.
    """
    return {name: spec.dtype for name, spec in open_tensors(path).specs.items()}


def _check_index(directory: Path, where: Mapping[str, str], files: Mapping[str, Header]) -> None:
    """ValueError unless every tensor is in the file that the index names; a warning about tensors it does not name."""
    for key, name in where.items():
        if key not in files[name].tensors:
            other = next((file for file, header in files.items() if key in header.tensors), None)
            found = f"which is in {other}" if other else "which is in no shard"
            raise ValueError(f"{directory / INDEX_NAME}: names {name} for {quoted(key)}, {found}; download both again")
    left = sorted({key for header in files.values() for key in header.tensors} - where.keys())
    if left:
        logger.warning(
            "%s does not name %s of its shards (%s), left out here",
            directory / INDEX_NAME, counted(len(left), "tensor"), listed(left),
        )  # fmt: skip


def _whole_set(directory: Path) -> list[str]:
    """The files 1 to N of N, if the directory has exactly one such set; else nothing."""
    sets: dict[str, list[str]] = {}
    for path in sorted(directory.glob("model-*-of-*.safetensors")) if directory.is_dir() else ():
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault(match[2], []).append(path.name)
    whole = [names for count, names in sets.items() if len(names) == int(count)]
    return whole[0] if len(whole) == len(sets) == 1 else []


def _index_files(directory: Path, index: Any) -> list[str]:
    names = shard_names(directory / INDEX_NAME, index, ".safetensors")
    there = {entry.name for entry in directory.iterdir()}  # an index may name half a million files: one look at all
    missing = [name for name in names if name not in there or not safe_file(directory, name).exists()]
    if missing:
        begun = [name for name in missing if any(name + ending in there for ending in HALF_FETCHED)]
        found = there.intersection(names).difference(missing)
        partly = f" ({begun[0]} is half downloaded)" if begun else ""
        raise FileNotFoundError(
            f"{directory}: {len(missing)} of {len(names)} shards missing: {listed(missing)}{partly}"
            f"{_missing_size(directory, index, found)}; run tt download again, it resumes{_or_without(directory)}"
        )
    return names


def shard_names(path: Path, index: Any, ending: str) -> list[str]:
    """The files that an index names, each a plain name with ``ending``; an error names the tensor of a bad one."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected an object with a weight_map from tensor names to file names; {DOWNLOAD}")
    names: dict[str, str] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: weight_map: {quoted(key)}: expected a file name, found {quoted(name)}")
        if name in names:
            continue
        check_basename(name, where=f"{path}: weight_map: {quoted(key)}")
        if not name.endswith(ending):
            raise ValueError(f"{path}: weight_map: {quoted(key)}: {quoted(name)} is not a *{ending} file; {DOWNLOAD}")
        names[name] = key
    if not names:
        raise ValueError(f"{path}: its weight_map is empty; {DOWNLOAD}")
    return sorted(names)


def _or_without(directory: Path) -> str:
    """The cure if a whole model is beside a stale index."""
    found = [SINGLE_NAME] if (directory / SINGLE_NAME).is_file() else _whole_set(directory)
    return f"; or, if {found[0]} is of the whole model and the index is old, remove {INDEX_NAME}" if found else ""


def _missing_size(directory: Path, index: dict[str, Any], found: Iterable[str]) -> str:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int) or not 0 <= total < 1 << 60:
        return ""
    present = sum((directory / name).stat().st_size for name in found)
    return f" (about {format_size(max(total - present, 0))})"


def describe_no_weights(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    names = [name for name in names if name.isprintable()]
    convert = f"tt convert {directory} DEST --to hf --allow-pickle"
    if "adapter_model.safetensors" in names:
        return f"{directory}: an adapter, not a model; give the directory of its base model"
    if "params.json" in names and any(re.fullmatch(r"consolidated.*\.(pth|safetensors)", name) for name in names):
        return f"{directory}: a Meta checkpoint, not a Hugging Face one; run: {convert}"
    pickles = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if pickles:
        what = f"weights only as pickles ({pickles[0]}), which can run code"
        return f"{directory}: {what}; if you trust them run: {convert}"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"{directory}: weights only as GGUF; run: tt convert {directory / ggufs[0]} DEST"
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return f"{directory}: the state of DeepSpeed's ZeRO; run: python {directory}/zero_to_fp32.py {directory} DEST"
    if parts := [name for name in names if (directory / name / ".metadata").is_file()]:
        part = directory / parts[0]
        return f"{directory}: a training state in {parts[0]}; run: tt convert {part} DEST --allow-pickle"
    left = (path.name for path in (directory / ".cache/huggingface/download").glob("*.incomplete"))
    if begun := [name for name in names if name.endswith(HALF_FETCHED)] or sorted(left):
        return f"{directory}: only {listed(begun)} of an interrupted download; run it again, it resumes"
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        close = difflib.get_close_matches(SINGLE_NAME, shards, 1, 0.0)[0]
        return f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME}, only {close}; rename it or download the index too"
    if runs := [name for name in names if (directory / name / "manifest.json").is_file()]:
        every = listed(directory / run for run in runs)
        return f"{directory}: a folder of runs, not a model; name one of them: {every}"
    found = listed(names, 8) or "nothing"
    return f"{directory}: no weights: expected {SINGLE_NAME} or {INDEX_NAME}, found {found}; download it"
