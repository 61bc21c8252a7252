"""Folders that ``torch.distributed.checkpoint`` wrote with its own storage (``.metadata`` and ``*.distcp``), read-only.

``.metadata`` is a pickle. It is read by an unpickler that knows the few names which occur there, and for each of them
makes an inert record instead of the real thing: nothing is imported, nothing is called. Entries that are no tensors
are pickles too, and are not read at all.
"""

import copy
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tt_ckpt.names import safe_file
from tt_ckpt.pickles import tensor_from_bytes
from tt_ckpt.tensor_file import DTYPES, TensorSpec, spec_of

METADATA_NAME = ".metadata"
_MAX_METADATA_BYTES = 1 << 30
_CHECKPOINT = "torch.distributed.checkpoint."
_RECORDS = {
    (_CHECKPOINT + "metadata", name)
    for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                 "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
} | {(_CHECKPOINT + "filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
     ("pathlib._local", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "WindowsPath")}  # fmt: skip
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class _Record:
    """Fields without behaviour, in place of an object of another class."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"a record lacks {name}")
        return state[name]


class _Size(tuple[int, ...]):
    """In place of torch.Size."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return _Size
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ValueError("it refers to another file")


@dataclass(frozen=True)
class _Piece:
    """A box of a tensor, and the bytes of a file that hold it."""

    file: str
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class DistributedFolder(Mapping[str, Tensor]):
    """The tensors of such a folder by their full names, each read and put together when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs, self._pieces = _read_metadata(folder / METADATA_NAME)
        for name, pieces in self._pieces.items():
            for piece in pieces:
                file = safe_file(folder, piece.file)
                if not file.is_file() or piece.start + piece.length > file.stat().st_size:
                    raise ValueError(f"{file}: missing or cut short: {name} should lie in it")

    def below(self, prefix: str) -> "DistributedFolder":
        """The tensors whose names begin with ``prefix``, without it."""
        result = copy.copy(self)
        names = [name for name in self.specs if name.startswith(prefix)]
        result.specs = {name.removeprefix(prefix): self.specs[name] for name in names}
        result._pieces = {name.removeprefix(prefix): self._pieces[name] for name in names}
        return result

    def __len__(self) -> int:
        return len(self.specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __getitem__(self, name: str) -> Tensor:
        spec, pieces = self.specs[name], self._pieces[name]
        result = torch.empty(spec.shape, dtype=spec.dtype)
        for piece in pieces:
            path = safe_file(self.folder, piece.file)
            with path.open("rb") as file:
                file.seek(piece.start)
                part = tensor_from_bytes(file.read(piece.length), where=f"{path}: {name}")
            if spec_of(part) != TensorSpec(dtype=spec.dtype, shape=piece.sizes):
                raise ValueError(f"{path}: {name} is {spec_of(part)} there, not what {METADATA_NAME} says")
            box = result
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                box = box.narrow(dim, offset, size)
            box.copy_(part)
        return result


def _read_metadata(path: Path) -> tuple[dict[str, TensorSpec], dict[str, list[_Piece]]]:
    if path.stat().st_size > _MAX_METADATA_BYTES:
        raise ValueError(f"{path}: refused: larger than {_MAX_METADATA_BYTES} bytes")
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        return _parse(metadata)
    except Exception as error:  # a pickle can fail in any way; none of them may pass
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: refused: {reason[:200]}") from None


def _parse(metadata: Any) -> tuple[dict[str, TensorSpec], dict[str, list[_Piece]]]:
    specs: dict[str, TensorSpec] = {}
    chunks: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for name, entry in metadata.field("state_dict_metadata").items():
        if "properties" not in (getattr(entry, "state", None) or {}):
            continue  # bytes: not read
        dtype = entry.field("properties").state[0]
        specs[str(name)] = TensorSpec(dtype=_DTYPES[dtype], shape=_sizes(entry.field("size")))
        for chunk in entry.field("chunks"):
            chunks[str(name), _sizes(chunk.field("offsets"))] = _sizes(chunk.field("sizes"))
    pieces: dict[str, list[_Piece]] = {name: [] for name in specs}
    for index, info in metadata.field("storage_data").items():
        name = index.field("fqn")
        if name not in specs:
            continue
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{name} is stored compressed, which is not read here")
        offsets = _sizes(index.field("offset") or ())
        start, length = _sizes((info.field("offset"), info.field("length")))
        pieces[name].append(_Piece(info.field("relative_path"), start, length, offsets, chunks[name, offsets]))
    for name, spec in specs.items():
        held = sum(TensorSpec(dtype=spec.dtype, shape=piece.sizes).numel for piece in pieces[name])
        inside = all(
            len(piece.offsets) == len(spec.shape)
            and all(o + s <= n for o, s, n in zip(piece.offsets, piece.sizes, spec.shape, strict=True))
            for piece in pieces[name]
        )
        if not inside or held != spec.numel:
            raise ValueError(f"{name} is not made up by its parts")
    return specs, pieces


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(value[0] if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], tuple) else value)
    if not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise ValueError(f"expected sizes, found {value!r:.80}")
    return sizes
