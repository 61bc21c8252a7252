"""A group of tensors in a training checkpoint: which files hold which parts of each, and the tensors put together.

A group ``g`` is either one plain ``g.safetensors``, or ``g.layout.json`` and a file per rank that saved it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tt_ckpt.names import safe_file
from tt_ckpt.ranks import Ranks
from tt_ckpt.tensor_file import DTYPES, Header, MappedFile, read_header, write_tensor_dict

Groups = Mapping[str, Mapping[str, Tensor]]


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
            raise ValueError(f"{self.folder / part.file}: {part.key} is {spec}, which its layout does not expect")
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
    try:
        entries = json.loads(path.read_bytes())["tensors"]
        found = {
            name: Whole(
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                tuple(
                    Part(
                        chunk["file"],
                        part_key(name, tuple(chunk["offsets"])),
                        tuple(chunk["offsets"]),
                        tuple(chunk["sizes"]),
                    )
                    for chunk in entry["chunks"]
                ),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: damaged") from None
    for name, whole in found.items():
        if not _is_sound(whole):
            raise ValueError(f"{path}: damaged: {name} has parts that do not make it up")
    return found


def _is_sound(whole: Whole) -> bool:
    """Sizes are sizes, each part lies inside, and together they are as large as the whole."""
    numbers = [*whole.shape, *(n for part in whole.parts for n in (*part.offsets, *part.sizes))]
    if not all(type(n) is int and n >= 0 for n in numbers):
        return False
    if any(len(part.offsets) != len(whole.shape) or len(part.sizes) != len(whole.shape) for part in whole.parts):
        return False
    inside = all(
        offset + size <= limit
        for part in whole.parts
        for offset, size, limit in zip(part.offsets, part.sizes, whole.shape, strict=True)
    )
    return inside and bool(whole.parts) and sum(prod(part.sizes) for part in whole.parts) == prod(whole.shape)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_groups(folder: Path, tensors: Groups, among: Ranks) -> dict[str, str]:
    """One file per group, or one per group and rank where tensors are spread; the sha256 of each."""
    if among.size > 1 or any(hasattr(tensor, "placements") for named in tensors.values() for tensor in named.values()):
        from tt_ckpt.sharded import save_sharded

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
