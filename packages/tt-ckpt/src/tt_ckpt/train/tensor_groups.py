"""A group of tensors in a training checkpoint: which files hold which parts of each, and the tensors put together.

A group ``g`` is either one plain ``g.safetensors``, or ``g.layout.json`` and a file per rank that saved it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tt_ckpt.files import read_json
from tt_ckpt.ranks import Ranks
from tt_ckpt.safe_names import check_basename, safe_file
from tt_ckpt.safetensors_file import DTYPES, Header, MappedFile, are_sizes, is_shape, read_header, write_tensor_dict
from tt_ckpt.shown import quoted

Groups = Mapping[str, Mapping[str, Tensor]]
_CURE = "use an older checkpoint"
_MAX_PARTS = 4096  # of one tensor, which no number of ranks needs


def part_key(name: str, offsets: tuple[int, ...]) -> str:
    """What a part is called in its file: the tensor's name, and where the part begins in the whole."""
    return f"{name}@{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and the file and key that hold it."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class Group(Mapping[str, Tensor]):
    """The tensors of a group by name, each read, and put together from its parts, when it is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        plain, layout = f"{name}.safetensors", f"{name}.layout.json"
        if (folder / plain).exists():
            self.wholes = _plain_layout(plain, read_header(safe_file(folder, plain)))
        else:
            self.wholes = _read_layout(safe_file(folder, layout))
        self._files: dict[str, MappedFile] = {}

    def __len__(self) -> int:
        return len(self.wholes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.wholes)

    def __getitem__(self, name: str) -> Tensor:
        whole = self.wholes[name]
        if len(whole.parts) == 1:
            return self.part(whole, whole.parts[0])
        result = torch.empty(whole.shape, dtype=whole.dtype)
        for part in whole.parts:
            box(result, part.offsets, part.sizes).copy_(self.part(whole, part))
        return result

    def part(self, whole: Whole, part: Part) -> Tensor:
        if part.file not in self._files:
            self._files[part.file] = MappedFile(safe_file(self.folder, part.file))
        file = self._files[part.file]
        spec = file.header.tensors.get(part.key)
        if spec is None or spec.dtype != whole.dtype or spec.shape != part.sizes:
            found = "is not there" if spec is None else f"is {spec}"
            raise ValueError(
                f"{self.folder / part.file}: {quoted(part.key)} {found}, its layout says otherwise; {_CURE}"
            )
        return file.tensor(part.key)


def box(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _plain_layout(file: str, header: Header) -> dict[str, Whole]:
    return {
        name: Whole(spec.dtype, spec.shape, (Part(file, name, (0,) * len(spec.shape), spec.shape),))
        for name, spec in header.tensors.items()
    }


def _read_layout(path: Path) -> dict[str, Whole]:
    value = read_json(path, cure=_CURE)
    entries = value.get("tensors") if isinstance(value, dict) else None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: damaged: expected an object with tensors; {_CURE}")
    return {name: _read_whole(path, name, entry) for name, entry in entries.items()}


def _read_whole(path: Path, name: str, entry: Any) -> Whole:
    try:
        boxes = [(tuple(chunk["offsets"]), tuple(chunk["sizes"])) for chunk in entry["chunks"]]
        files = [check_basename(chunk["file"], where=path) for chunk in entry["chunks"]]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged: {quoted(name)} lacks dtype, shape or chunks; {_CURE}") from None
    if not boxes or not is_cover(shape, boxes):
        raise ValueError(f"{path}: damaged: {quoted(name)} has parts that do not make it up; {_CURE}")
    parts = (
        Part(file, part_key(name, offsets), offsets, sizes) for file, (offsets, sizes) in zip(files, boxes, strict=True)
    )
    return Whole(dtype, shape, tuple(parts))


def is_cover(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes (offsets and sizes) lie inside ``shape``, none over another, and make it up."""
    if not is_shape(shape):
        return False
    for offsets, sizes in boxes:
        if not are_sizes(offsets) or not are_sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            return False
        if any(offset + size > limit for offset, size, limit in zip(offsets, sizes, shape, strict=True)):
            return False
    if sum(prod(sizes) for _, sizes in boxes) != prod(shape):
        return False
    full = [box for box in boxes if prod(box[1])]
    if len(full) < 2 or not shape:
        return len(full) < 2
    if len(full) > _MAX_PARTS:
        return False
    begin = np.array([offsets for offsets, _ in full], dtype=np.int64)
    end = begin + np.array([sizes for _, sizes in full], dtype=np.int64)
    return not any(
        bool(((begin[i + 1 :] < end[i]) & (begin[i] < end[i + 1 :])).all(axis=1).any()) for i in range(len(full) - 1)
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_groups(folder: Path, tensors: Groups, among: Ranks) -> dict[str, str]:
    """One file per group, or one per group and rank where tensors are spread; the sha256 of each."""
    if among.size > 1 or any(hasattr(tensor, "placements") for named in tensors.values() for tensor in named.values()):
        from tt_ckpt.train.sharded import save_sharded

        return save_sharded(folder, tensors, among)
    hashes = {}
    for group, named in tensors.items():
        digest = write_tensor_dict(folder / f"{group}.safetensors", named, hashed=True)
        assert digest is not None
        hashes[f"{group}.safetensors"] = digest
    return hashes


def copies(tensors: Groups) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU that further training does not change."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    staged: dict[str, dict[str, Tensor]] = BlockingAsyncStager().stage({k: dict(v) for k, v in tensors.items()})
    return staged
