"""Folders of ``torch.distributed.checkpoint`` with its own storage (``.metadata``, ``*.distcp``), as torchtitan saves.

``.metadata`` is a pickle, of which the names that occur there are known. It is read as plain records: nothing is
imported, nothing is called. Entries that are not tensors are pickles too, and are not read at all.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.files import read_bytes
from tt_ckpt.formats.pickle_records import MAX_BYTES, Record, read_inert
from tt_ckpt.formats.pickles import tensor_from_bytes
from tt_ckpt.ranks import box, is_cover
from tt_ckpt.safe_names import safe_file
from tt_ckpt.safetensors_file import DTYPES, TensorSpec, are_sizes, spec_of
from tt_ckpt.shown import plain, quoted

METADATA_NAME = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_CALLED = {
    *(f"{_CHECKPOINT}metadata.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    f"{_CHECKPOINT}filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
    "collections.OrderedDict", "pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.WindowsPath",
    "builtins.getattr",  # how Python 3.11.0 to 3.11.3 write a member of an enum; a record like the others, not called
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class _Piece:
    """A box of a tensor, and where its bytes are."""

    file: str
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class DistributedFolder(Mapping[str, Tensor]):
    """The tensors of such a folder by their full names. Each is read and put together when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs, self._pieces = _read_metadata(folder / METADATA_NAME)
        for name, pieces in self._pieces.items():
            for piece in pieces:
                file = safe_file(folder, piece.file)
                if not file.is_file() or piece.start + piece.length > file.stat().st_size:
                    raise ValueError(f"{file}: missing or cut short: {plain(name)} should be in it; copy it again")

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
                part = tensor_from_bytes(file.read(piece.length), where=f"{path}: {plain(name)}")
            if spec_of(part) != TensorSpec(dtype=spec.dtype, shape=piece.sizes):
                raise ValueError(f"{path}: {name} is {spec_of(part)}, not what {METADATA_NAME} says; copy it again")
            box(result, piece.offsets, piece.sizes).copy_(part)
        return result


def _read_metadata(path: Path) -> tuple[dict[str, TensorSpec], dict[str, list[_Piece]]]:
    data = read_bytes(path, limit=MAX_BYTES)
    try:
        return _parse(read_inert(data, lambda name: name in _CALLED or name in _DTYPES, _CALLED.__contains__))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it does not have the form of such a file"
        raise ValueError(f"{path}: refused: {reason}; copy the folder again") from None


def _parse(metadata: Any) -> tuple[dict[str, TensorSpec], dict[str, list[_Piece]]]:
    specs: dict[str, TensorSpec] = {}
    chunks: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for name, entry in metadata.field("state_dict_metadata").items():
        if "properties" not in (entry.state or {}):
            continue  # bytes: not read
        if not isinstance(name, str) or not name.isprintable() or len(name) > 1000:
            raise ValueError(f"it has a tensor called {quoted(name)}")
        dtype = entry.field("properties").state[0]
        specs[name] = TensorSpec(dtype=_DTYPES[dtype], shape=_sizes(entry.field("size")))
        for chunk in entry.field("chunks"):
            chunks[name, _sizes(chunk.field("offsets"))] = _sizes(chunk.field("sizes"))
    pieces: dict[str, list[_Piece]] = {name: [] for name in specs}
    for index, info in metadata.field("storage_data").items():
        name = index.field("fqn")
        if name not in specs:
            continue
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{plain(name)} is stored compressed, which is not read here")
        offsets = _sizes(index.field("offset") or ())
        start, length = _sizes((info.field("offset"), info.field("length")))
        pieces[name].append(_Piece(info.field("relative_path"), start, length, offsets, chunks[name, offsets]))
    for name, spec in specs.items():
        held = pieces[name]
        within = all(TensorSpec(dtype=spec.dtype, shape=piece.sizes).nbytes <= piece.length for piece in held)
        if not within or not is_cover(spec.shape, [(piece.offsets, piece.sizes) for piece in held]):
            raise ValueError(f"{plain(name)} is not covered exactly by its parts")
    return specs, pieces


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, Record) and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple) or not are_sizes(value):
        raise ValueError(f"expected sizes, found {quoted(value)}")
    return value
