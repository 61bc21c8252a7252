"""One safetensors file: a strict header, and tensors read and written one at a time.

The format: https://github.com/huggingface/safetensors#format. Headers are checked here before anything is allocated.
Files are written here because the library's ``save_file`` needs every tensor at once, and does not fsync.
"""

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.files import DOWNLOAD, create, refuse_placeholder, regular, sync
from tt_ckpt.shown import counted, plain, quoted

MAX_HEADER_BYTES = 25_000_000  # the hub's limit; the library's own is 100 MB
_WRITE_BYTES = 1 << 18  # for 2 MiB the system looks for contiguous memory, which can cost more than the copy
_CAST_BYTES = 1 << 20  # fits into a cache

# In the order in which the safetensors library writes tensors (widest first), so that our files equal its files.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16,
    "I16": torch.int16, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors of one file in the order of their bytes, and the file's text metadata."""

    path: Path
    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]  # in the file
    metadata: dict[str, str] | None


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(dtype=tensor.dtype, shape=tuple(tensor.shape))


def canonical_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The order in which the safetensors library writes: by dtype, then by name."""
    return sorted(specs, key=lambda name: (_RANK[NAMES_OF_DTYPES[specs[name].dtype]], name))


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_header(path: str | Path, root: str | Path | None = None) -> Header:
    """Read and check a safetensors header. A damaged file is a ValueError that names the file and what is wrong."""
    path = regular(path, root)
    with path.open("rb") as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(1024)
        length = int.from_bytes(first[:8], "little")
        if first:
            refuse_placeholder(path, first)
        if len(first) < 8:
            short = f"{counted(size, 'byte')}, too short for a safetensors file" if first else "0 bytes"
            raise ValueError(f"{plain(path)}: {short}; {DOWNLOAD}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{plain(path)}: not a safetensors file (its header would be {length} bytes); {DOWNLOAD}")
        if 8 + length > size:
            raise ValueError(f"{plain(path)}: cut short: {size} bytes of at least {8 + length}; {DOWNLOAD}")
        file.seek(8)
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates) if raw[:1] == b"{" else None
        return _parse_header(path, entries, 8 + length, size)
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except ValueError as error:  # our own, or the parser's
        reason = str(error)
    raise ValueError(f"{plain(path)}: damaged safetensors header: {reason}; {DOWNLOAD}")


def _parse_header(path: Path, entries: Any, start: int, size: int) -> Header:
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_text:
        raise ValueError("__metadata__ must map text to text")
    spans = sorted((_parse_entry(name, entry) for name, entry in entries.items()), key=lambda span: span[1:3])
    position = 0
    for name, begin, end, spec in spans:
        if begin != position or end - begin != spec.nbytes:
            span = f"{position} to {position + spec.nbytes}"
            raise ValueError(f"tensor {quoted(name)} has bytes {begin} to {end}, expected {span}")
        position = end
    if start + position != size:
        what = "cut short" if size < start + position else "too long"
        raise ValueError(f"{what}: {size} bytes, its header says {start + position}")
    return Header(
        path=path,
        tensors={name: spec for name, _, _, spec in spans},
        offsets={name: start + begin for name, begin, _, _ in spans},
        metadata=metadata,
    )


def _parse_entry(name: str, entry: Any) -> tuple[str, int, int, TensorSpec]:
    if not name or len(name) > 1000 or not name.isprintable():
        raise ValueError(f"tensor {quoted(name)} has a name that is not 1 to 1000 printable characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {quoted(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {quoted(name)} has the unknown dtype {quoted(dtype)}; known: {', '.join(DTYPES)}")
    if not is_shape(shape) or not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {quoted(name)} has shape {quoted(shape)} and data_offsets {quoted(offsets)}")
    return name, offsets[0], offsets[1], TensorSpec(dtype=DTYPES[dtype], shape=tuple(shape))


def are_sizes(value: Any) -> bool:
    """Whether ``value`` is a short list of whole numbers that are not too large to count with."""
    few = isinstance(value, list | tuple) and len(value) <= 32
    return few and all(type(size) is int and 0 <= size < 1 << 60 for size in value)


def is_shape(value: Any) -> bool:
    """Whether ``value`` is sizes whose product torch can count, of an empty tensor too."""
    return are_sizes(value) and bool(math.prod(size for size in value if size) < 1 << 60)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key in counts if counts[key] > 1)
        raise ValueError(f"{quoted(twice)} appears twice")
    return found


def read_tensor(header: Header, name: str, out: Tensor) -> None:
    """Fill ``out`` with a tensor of the file, cast and moved to another device a piece at a time if need be.

    There is no memory map: no page of the file counts as this process's, and a file that is cut short while it is read
    is an error, not the end of the process. transformers maps its files, which costs no copy; there a file that is
    written over later changes the weights, and one that is cut short ends the process.
    """
    spec = header.tensors[name]
    assert tuple(out.shape) == spec.shape
    if not out.is_contiguous() or type(out) is not Tensor:
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        read_tensor(header, name, whole)
        out.copy_(whole)
        return
    if out.dtype == spec.dtype and out.device.type == "cpu":
        for _ in read_pieces(header, name, max(1, out.numel()), out.view(-1)):
            pass
        return
    first = 0
    for piece in read_pieces(header, name, max(1, _CAST_BYTES // spec.dtype.itemsize)):
        out.view(-1)[first : first + piece.numel()].copy_(piece)
        first += piece.numel()


def read_pieces(header: Header, name: str, numel: int, into: Tensor | None = None) -> Iterator[Tensor]:
    """The values of a tensor of the file, ``numel`` at a time, in memory that the next piece overwrites (``into``)."""
    spec = header.tensors[name]
    total = spec.nbytes // spec.dtype.itemsize
    buffer = torch.empty(min(numel, total), dtype=spec.dtype) if into is None else into
    with header.path.open("rb", buffering=0) as file:
        file.seek(header.offsets[name])
        for begin in range(0, max(total, 1), numel):  # an empty tensor is one empty piece
            piece = buffer[: total - begin]
            view = memoryview(flat_bytes(piece).numpy())  # type: ignore[arg-type]
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{header.path}: cut short while it was read; {DOWNLOAD}")
                view = view[count:]
            yield piece


# ---- writing ---------------------------------------------------------------------------------------------------------


def encode_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON of a file of ``specs`` in their order: the bytes that the safetensors library writes."""
    if "__metadata__" in specs:
        raise ValueError("a tensor cannot be called __metadata__ in a safetensors file")
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, spec in specs.items():
        end = position + spec.nbytes
        dtype = NAMES_OF_DTYPES[spec.dtype]
        entries[name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_tensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    hashed: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str | None:
    """Write the tensors ``get(name)``, one at a time and in the order of ``specs``, to a new file, and fsync it.

    ``get`` may give a tensor in pieces, which need not be in memory together. Returns the sha256 of the file if
    ``hashed``. ``progress`` is called with the bytes of each tensor written.
    """
    header = encode_header(specs, metadata)
    digest = hashlib.sha256(header) if hashed else None
    with create(path) as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        for name, spec in specs.items():
            for piece in announced(path, name, spec, get(name)):
                hashing = hasher.submit(digest.update, piece) if digest else None
                file.write(piece)  # hashing takes longer than writing: do both at once
                if hashing:
                    hashing.result()
            if progress:
                progress(spec.nbytes)
        sync(file)
    return digest.hexdigest() if digest else None


def write_tensor_dict(path: str | Path, tensors: Mapping[str, Tensor], *, hashed: bool = False) -> str | None:
    """``write_tensors`` for tensors in memory, in the library's order."""
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    ordered = {name: specs[name] for name in canonical_order(specs)}
    return write_tensors(path, ordered, lambda name: tensors[name], metadata={"format": "pt"}, hashed=hashed)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor; no copy if it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def announced(path: str | Path, name: str, spec: TensorSpec, given: Tensor | Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of a tensor, which may be given in pieces; ValueError unless they are of ``spec``."""
    if isinstance(given, Tensor) and spec_of(given) != spec:
        raise ValueError(f"{path}: tensor {name!r} is {spec_of(given)}, announced as {spec}")
    nbytes = 0
    for piece in (given,) if isinstance(given, Tensor) else given:
        nbytes += piece.nbytes
        if piece.dtype != spec.dtype or nbytes > spec.nbytes:
            raise ValueError(f"{path}: tensor {name!r} has pieces {spec_of(piece)}, announced as {spec}")
        flat = flat_bytes(piece)
        for start in range(0, flat.numel(), _WRITE_BYTES):
            yield memoryview(flat[start : start + _WRITE_BYTES].numpy())  # type: ignore[arg-type]
    if nbytes != spec.nbytes:
        raise ValueError(f"{path}: tensor {name!r} has {nbytes} bytes, announced as {spec}")
