"""One GGUF file, or the parts of a split one: a strict header, and tensors read and dequantized some rows at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is checked here, each count against
the size of the file. The ``gguf`` package decodes the blocks of quantized tensors.
"""

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tt_ckpt.files import DOWNLOAD, read_start
from tt_ckpt.formats.gguf.blocks import PLAIN, can_decode, decode, nearest_kind, quant_sizes, update_hint
from tt_ckpt.safe_names import safe_file
from tt_ckpt.shown import listed, quoted

MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PIECE = 1 << 22  # values that are dequantized at once
_MAX_ENTRIES = 1 << 22  # of all lists: tokens, their types and scores, and merges
_MAX_HEADER_BYTES = 1 << 26
_MAX_TENSORS = 1 << 17
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where a tensor is, and how its rows are stored. ``shape`` has the innermost dimension last, as in torch."""

    file: Path
    start: int
    kind: str
    shape: tuple[int, ...]
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that has all of its values."""
        return PLAIN.get(self.kind, torch.float32)

    @property
    def quantized(self) -> bool:
        return self.kind not in PLAIN


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """The key-value pairs and the tensors of a model, which may be in several files."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether it is a regular file that begins as a GGUF file or has its suffix."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def find_gguf(directory: Path) -> Path | None:
    """The one GGUF model of a directory without other weights, the first part if it is split.

    A ValueError if there are several.
    """
    entries = sorted(entry for entry in directory.iterdir() if entry.is_file())
    if any(entry.suffix in (".safetensors", ".bin", ".pt", ".pth", ".distcp") for entry in entries):
        return None
    names = [entry.name for entry in entries if entry.suffix == ".gguf"]
    first = [name for name in names if (part := _PART.fullmatch(name)) is None or int(part[2]) == 1]
    if len(first) > 1:
        raise ValueError(f"{directory}: several GGUF models ({listed(first, 5)}); give one of these files")
    return safe_file(directory, first[0]) if first else None


def read_gguf(path: Path) -> GGUF:
    """Read and check the header of a GGUF file, and of the other parts if it is the first of a split model."""
    quant_sizes()
    values, tensors = _read_one(path)
    count = values.get("split.count", 0)
    if count in (0, 1):
        return GGUF(path=path, values=values, tensors=tensors)
    part = _PART.fullmatch(path.name)
    if type(count) is not int or part is None or int(part[3]) != count or int(part[2]) != 1:
        raise ValueError(f"{path}: part of a model split in {quoted(count)}; give the first part, NAME-00001-of-N.gguf")
    for i in range(2, count + 1):
        other = safe_file(path.parent, f"{part[1]}-{i:05d}-of-{part[3]}.gguf")
        if not other.is_file():
            raise FileNotFoundError(f"{other}: missing: {path.name} is the first of {count} parts; download the others")
        more = _read_one(other)[1]
        if twice := sorted(more.keys() & tensors.keys()):
            raise ValueError(f"{other}: tensor {quoted(twice[0])} is in another part too; {DOWNLOAD}")
        tensors |= more
    return GGUF(path=path, values=values, tensors=tensors)


def read_rows(tensor: GGUFTensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rows of the tensor, as a matrix, in ``dtype``: dequantized in fp32 and rounded once, some at a time."""
    width = tensor.shape[-1]
    out = torch.empty(count, width, dtype=dtype)
    step = max(1, _PIECE // width)
    with tensor.file.open("rb", buffering=0) as file:
        for begin in range(0, count, step):
            rows = min(step, count - begin)
            raw: np.ndarray[Any, Any] = np.empty((rows, tensor.row_bytes), dtype=np.uint8)
            file.seek(tensor.start + (first + begin) * tensor.row_bytes)
            _read_into(file, memoryview(raw.data).cast("B"), tensor.file)
            out[begin : begin + rows] = decode(raw, tensor.kind)
    return out


def _read_into(file: IO[bytes], view: memoryview, path: Path) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{path}: cut short while it was read; {DOWNLOAD}")
        view = view[count:]


# ---- the header ------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads the bytes of a header in their order, none beyond the end of the file."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.size, self.at = path, file, path.stat().st_size, 0
        self.entries = 0  # of all lists

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(
                f"{self.path}: cut short or damaged: {count} bytes are announced at {self.at}, "
                f"the file has {self.size}; {DOWNLOAD}"
            )
        if self.at + count > _MAX_HEADER_BYTES:
            raise ValueError(f"{self.path}: damaged: a header of more than {_MAX_HEADER_BYTES} bytes; {DOWNLOAD}")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError(f"{self.path}: cut short while it was read; {DOWNLOAD}")
        self.at += count
        return data

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def text(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            at = self.at - len(raw)
            raise ValueError(f"{self.path}: damaged: text at byte {at} is not UTF-8; {DOWNLOAD}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.number("<I"), self.number("<Q")
            kind = of if of != _STRING and of != _ARRAY and of not in _SCALARS else kind
            if of == _STRING:
                self.announced(count, 8)
                return [self.text() for _ in range(count)]
            if of in _SCALARS:
                width = np.dtype(_SCALARS[of]).itemsize
                self.announced(count, width)
                return np.frombuffer(self.take(count * width), dtype=_SCALARS[of]).tolist()
        if kind in _SCALARS:
            found = np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), dtype=_SCALARS[kind])[0]
            # 1e-05 for the fp32 number 9.999999747378752e-06, as the model's config spelled it
            return float(str(found)) if isinstance(found, np.float32) else found.item()
        what = "a list of lists" if kind == _ARRAY else f"unknown type {kind} of a value"
        raise ValueError(f"{self.path}: damaged: {what} at byte {self.at}; {DOWNLOAD}")

    def announced(self, count: int, width: int) -> None:
        """Refuse a count larger than the rest of the file, before anything is allocated for it."""
        self.entries += count
        if count > (self.size - self.at) // width or self.entries > _MAX_ENTRIES:
            where = f"{count} entries are announced at byte {self.at} of {self.size}"
            raise ValueError(f"{self.path}: damaged: {where}; {DOWNLOAD}")


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    with path.open("rb") as file:
        reader = _Reader(path, file)
        _check_start(reader)
        num_tensors, num_values = reader.number("<Q"), reader.number("<Q")
        reader.announced(num_values, 13)
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = reader.text()
            if key in values:
                raise ValueError(f"{path}: damaged: key {quoted(key)} appears twice; {DOWNLOAD}")
            if not key.isprintable():
                raise ValueError(f"{path}: damaged: it has the key {quoted(key)}; {DOWNLOAD}")
            values[key] = reader.value(reader.number("<I"))
        if num_tensors > _MAX_TENSORS:
            raise ValueError(f"{path}: damaged: {num_tensors} tensors are announced; {DOWNLOAD}")
        reader.announced(num_tensors, 24)
        infos = [_read_info(reader) for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            found = quoted(alignment)
            raise ValueError(f"{path}: general.alignment: expected a power of two, found {found}; {DOWNLOAD}")
        start = -(-reader.at // alignment) * alignment
    return values, _place(path, infos, start, alignment)


def _check_start(reader: _Reader) -> None:
    path = reader.path
    read_start(path, path.resolve().parent)
    if reader.size < 24 or reader.take(4) != MAGIC:
        raise ValueError(f"{path}: {reader.size} bytes, not a GGUF file; {DOWNLOAD}")
    version = reader.number("<I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian" if swapped in (2, 3) else f"version {version}"
        raise ValueError(f"{path}: a GGUF file of {what}; only versions 2 and 3, little-endian, can be read")


def _read_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.text()
    num_dims = reader.number("<I")
    if not 1 <= num_dims <= 4 or len(name) > 256 or not name.isprintable():
        raise ValueError(f"{reader.path}: damaged: tensor {quoted(name)} with {num_dims} dimensions; {DOWNLOAD}")
    dims = tuple(reader.number("<Q") for _ in range(num_dims))
    return name, dims, reader.number("<I"), reader.number("<Q")


def _place(
    path: Path, infos: Sequence[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
) -> dict[str, GGUFTensor]:
    """The tensors by name; ValueError unless each is inside the file and none overlaps another."""
    sizes, size = quant_sizes(), path.stat().st_size
    found: dict[str, GGUFTensor] = {}
    end = 0
    for name, dims, number, offset in sorted(infos, key=lambda info: info[3]):
        shown = f"{path}: tensor {quoted(name)}"
        if number not in sizes:
            raise ValueError(f"{shown} has type {number}, which the gguf package here does not know; {update_hint()}")
        kind, block, block_bytes = sizes[number]
        if kind not in PLAIN and not can_decode(kind):
            raise ValueError(f"{shown} is {kind}, which is not decoded; nearest: {nearest_kind(kind)}")
        if dims[0] % block or not all(dims):
            raise ValueError(f"{shown} with {list(dims)} values: not in blocks of {block}; {DOWNLOAD}")
        row_bytes = dims[0] // block * block_bytes
        nbytes = row_bytes * math.prod(dims[1:])
        if name in found or offset % alignment or offset < end:
            raise ValueError(f"{shown} at {offset} is misplaced or appears twice; {DOWNLOAD}")
        end = offset + nbytes
        if start + end > size:
            raise ValueError(f"{path}: cut short: {size} bytes of at least {start + end}; {DOWNLOAD}")
        found[name] = GGUFTensor(
            file=path, start=start + offset, kind=kind, shape=tuple(reversed(dims)), row_bytes=row_bytes
        )
    return found
