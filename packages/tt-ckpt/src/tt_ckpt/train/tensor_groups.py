"""Reading a group of tensors of a training checkpoint: which files hold which parts, and each tensor put together.

A group ``g`` is either one plain ``g.safetensors``, or ``g.layout.json`` and a file for each rank that saved it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.files import read_json
from tt_ckpt.mapped_file import MappedFile
from tt_ckpt.ranks import box, chunk_of, is_cover, is_dtensor, like_dtensor
from tt_ckpt.safe_names import check_basename, safe_file
from tt_ckpt.safetensors_file import DTYPES, Header, read_header
from tt_ckpt.shown import quoted

Groups = Mapping[str, Mapping[str, Tensor]]
_CURE = "use an older checkpoint"


def part_key(name: str, offsets: tuple[int, ...]) -> str:
    """The name of a part in its file: the tensor's name, and where the part begins in the whole tensor."""
    return f"{name}@{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and the file and the name there that hold it."""

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
    """The tensors of a group by name. Each is read, and put together from its parts, when it is asked for."""

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

    def held(self, name: str, like: Tensor) -> Tensor:
        """What this rank holds of a tensor that is spread as ``like`` is, read from the parts that have some of it.

        A plain ``like`` gives the whole tensor. Shapes must be equal; the dtype is the saved one.
        """
        if not is_dtensor(like):
            return self[name]
        whole = self.wholes[name]
        if whole.shape != tuple(like.shape):
            raise ValueError(f"{self.folder}: {name} was saved as {list(whole.shape)}, not {list(like.shape)}; {_CURE}")
        own = chunk_of(like)
        local = torch.empty(own.sizes, dtype=whole.dtype)
        for part in whole.parts:
            begin = [max(pair) for pair in zip(own.offsets, part.offsets, strict=True)]
            ends = zip(own.offsets, own.sizes, part.offsets, part.sizes, strict=True)
            sizes = [min(a + b, c + d) - start for (a, b, c, d), start in zip(ends, begin, strict=True)]
            if min(sizes, default=1) > 0:
                source = box(self.part(whole, part), [b - o for b, o in zip(begin, part.offsets, strict=True)], sizes)
                box(local, [b - o for b, o in zip(begin, own.offsets, strict=True)], sizes).copy_(source)
        return like_dtensor(local.to(like.to_local().device), like)

    def part(self, whole: Whole, part: Part) -> Tensor:
        if part.file not in self._files:
            self._files[part.file] = MappedFile(safe_file(self.folder, part.file))
        file = self._files[part.file]
        spec = file.header.tensors.get(part.key)
        if spec is None or spec.dtype != whole.dtype or spec.shape != part.sizes:
            found = "is not there" if spec is None else f"is {spec}"
            raise ValueError(
                f"{self.folder / part.file}: {quoted(part.key)} {found}, but its layout disagrees; {_CURE}"
            )
        return file.tensor(part.key)


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
        raise ValueError(f"{path}: damaged: {quoted(name)} has parts that do not cover it; {_CURE}")
    parts = (
        Part(file, part_key(name, offsets), offsets, sizes) for file, (offsets, sizes) in zip(files, boxes, strict=True)
    )
    return Whole(dtype, shape, tuple(parts))
