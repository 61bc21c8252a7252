"""Which tensor lies in which file: the shards of a directory, their index, and splitting anew.

The rule for splitting and the index's form are those of huggingface_hub, so that files come out the same.
"""

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.files import read_json
from tt_ckpt.hf.placed_file import PlacedFile
from tt_ckpt.placeholder import DOWNLOAD, HALF_FETCHED, half_fetched
from tt_ckpt.safe_names import check_basename, safe_file
from tt_ckpt.safetensors_file import Header, MappedFile, TensorSpec, read_header
from tt_ckpt.shown import UNITS, format_size, listed, quoted

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The weight files of a directory: ``files`` maps names to headers, ``where`` a key to its file's name."""

    directory: Path
    files: dict[str, Header]
    where: dict[str, str]
    index: dict[str, Any] | None

    def spec(self, key: str) -> TensorSpec:
        return self.files[self.where[key]].tensors[key]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for header in self.files.values() for spec in header.tensors.values())


def find_shards(directory: Path) -> Shards:
    """Read the index and every header of a Hugging Face directory; what is missing or odd is named."""
    if os.path.lexists(directory / INDEX_NAME):
        index = read_json(directory / INDEX_NAME)
        names = _index_files(directory, index)
    elif os.path.lexists(directory / SINGLE_NAME):
        index, names = None, [SINGLE_NAME]
    elif whole := _whole_set(directory):  # without its index
        index, names = None, whole
    else:
        raise FileNotFoundError(describe_no_weights(directory))
    files = {name: read_header(safe_file(directory, name)) for name in names}
    if index is None:
        where = _where(directory, files)
    else:
        where = index["weight_map"]
        _check_index(directory, where, files)
    return Shards(directory=directory, files=files, where=where, index=index)


def _where(directory: Path, files: Mapping[str, Header]) -> dict[str, str]:
    where: dict[str, str] = {}
    for name, header in files.items():
        for key in header.tensors:
            if key in where:
                raise ValueError(
                    f"{directory}: tensor {quoted(key)} is in {where[key]} and in {name}; download {INDEX_NAME} too"
                )
            where[key] = name
    return where


def _check_index(directory: Path, where: Mapping[str, str], files: Mapping[str, Header]) -> None:
    """Every tensor is in the file that the index names. Tensors that it does not name are left out, with a warning."""
    for key, name in where.items():
        if key not in files[name].tensors:
            other = next((file for file, header in files.items() if key in header.tensors), None)
            found = f"which is in {other}" if other else "which is in no shard"
            raise ValueError(f"{directory / INDEX_NAME}: names {name} for {quoted(key)}, {found}; download both again")
    left = sorted({key for header in files.values() for key in header.tensors} - where.keys())
    if left:
        logger.warning(
            "%s does not name %d tensors of its shards (%s), which are left out",
            directory / INDEX_NAME, len(left), listed(left),
        )  # fmt: skip


def _whole_set(directory: Path) -> list[str]:
    """Shards 1 to N of N, if there is one such set; else nothing."""
    sets: dict[str, list[str]] = {}
    for path in sorted(directory.glob("model-*-of-*.safetensors")) if directory.is_dir() else ():
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault(match[2], []).append(path.name)
    whole = [names for count, names in sets.items() if len(names) == int(count)]
    return whole[0] if len(whole) == len(sets) == 1 else []


def _index_files(directory: Path, index: Any) -> list[str]:
    names = shard_names(directory / INDEX_NAME, index, ".safetensors")
    missing = [name for name in names if not safe_file(directory, name).exists()]
    if missing:
        begun = [name for name in missing if half_fetched(directory / name)]
        partly = f" ({begun[0]} is half downloaded)" if begun else ""
        raise FileNotFoundError(
            f"{directory}: {len(missing)} of {len(names)} shards missing: {listed(missing)}{partly}"
            f"{_missing_size(directory, index, names)}; run tt download again, it resumes{_or_without(directory)}"
        )
    return names


def shard_names(path: Path, index: Any, ending: str) -> list[str]:
    """The files that an index names, each a plain name with ``ending``; what is odd is named with its tensor."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected an object with a weight_map from tensor names to file names; {DOWNLOAD}")
    names: dict[str, str] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in names:
            if not isinstance(name, str):
                raise ValueError(f"{path}: weight_map: {quoted(key)}: expected a file name, found {quoted(name)}")
            continue
        check_basename(name, where=f"{path}: weight_map: {quoted(key)}")
        if not name.endswith(ending):
            raise ValueError(f"{path}: weight_map: {quoted(key)}: {quoted(name)} is not a *{ending} file; {DOWNLOAD}")
        names[name] = key
    if not names:
        raise ValueError(f"{path}: its weight_map is empty; {DOWNLOAD}")
    return sorted(names)


def _or_without(directory: Path) -> str:
    """Another whole model beside a stale index."""
    found = [SINGLE_NAME] if (directory / SINGLE_NAME).is_file() else _whole_set(directory)
    return f"; or, if {found[0]} is of the whole model and the index is old, remove {INDEX_NAME}" if found else ""


def _missing_size(directory: Path, index: dict[str, Any], names: list[str]) -> str:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(total, int) or not 0 <= total < 1 << 60:
        return ""
    present = sum((directory / name).stat().st_size for name in names if (directory / name).exists())
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
        return (
            f"{directory}: weights only as pickles ({pickles[0]}), which can run code; if you trust them run: {convert}"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"{directory}: weights only as GGUF; run: tt convert {directory / ggufs[0]} DEST"
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return f"{directory}: the state of DeepSpeed's ZeRO; run: python {directory}/zero_to_fp32.py {directory} DEST"
    if parts := [name for name in names if (directory / name / ".metadata").is_file()]:
        return (
            f"{directory}: a training state in {parts[0]}; run: tt convert {directory / parts[0]} DEST --allow-pickle"
        )
    if begun := [name for name in names if name.endswith(HALF_FETCHED)] or _fetched_in_part(directory):
        return f"{directory}: only {listed(begun)} of an interrupted download; run it again, it resumes"
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        close = difflib.get_close_matches(SINGLE_NAME, shards, 1, 0.0)[0]
        return f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME}, only {close}; rename it or download the index too"
    if runs := [name for name in names if (directory / name / "manifest.json").is_file()]:
        return (
            f"{directory}: a folder of runs, not a model; name one of them: {listed(directory / run for run in runs)}"
        )
    found = listed(names, 8) or "nothing"
    return f"{directory}: no weights: expected {SINGLE_NAME} or {INDEX_NAME}, found {found}; download it"


def _fetched_in_part(directory: Path) -> list[str]:
    """What an interrupted ``tt download -o`` has of the weights."""
    return sorted(path.name for path in (directory / ".cache/huggingface/download").glob("*.incomplete"))


class OpenShards:
    """The tensors of a directory by key, each file opened when first needed and let go by ``release``.

    ``tensors[key]`` is a view of a memory map; all else is read into memory without one.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._mapped: dict[str, MappedFile] = {}
        self._placed: dict[str, PlacedFile] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __getitem__(self, key: str) -> Tensor:
        name = self.shards.where[key]
        if name not in self._mapped:
            header = self.shards.files[name]
            self._mapped[name] = MappedFile(header.path, header)
        return self._mapped[name].tensor(key)

    def read_into(self, key: str, out: Tensor) -> None:
        """Fill ``out``, cast to its dtype and moved to its device a piece at a time where those differ."""
        self._file_of(key).read_into(key, out)

    def read(self, key: str) -> Tensor:
        """The tensor in memory of its own."""
        spec = self.shards.spec(key)
        out = torch.empty(spec.shape, dtype=spec.dtype)
        self.read_into(key, out)
        return out

    def borrow(self, key: str) -> Tensor:
        """The tensor in memory that the next call of ``borrow`` writes to."""
        spec = self.shards.spec(key)
        if self._buffer.numel() < spec.nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # gone before the larger one comes
            self._buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        out = self._buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)
        self.read_into(key, out)
        return out

    def _file_of(self, key: str) -> PlacedFile:
        name = self.shards.where[key]
        if name not in self._placed:
            self._placed[name] = PlacedFile(self.shards.files[name])
        return self._placed[name]

    def release(self, name: str) -> None:
        for held in (self._mapped, self._placed):
            if name in held:
                held.pop(name).close()


# ---- splitting ---------------------------------------------------------------------------------------------------


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


def split(specs: Mapping[str, TensorSpec], max_shard_size: str | int) -> dict[str, list[str]]:
    """File name -> keys, filled in the given order; a tensor over the limit has a file of its own."""
    limit = parse_size(max_shard_size)
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
