"""The only module that reads or writes pickles: ``.pth``, ``.pt`` and ``.bin`` files of tensors.

Reading needs the caller's ``allow_pickle``, and uses torch's restricted unpickler on memory-mapped files, never the
full one. Files that are written contain a dict of tensors and nothing else.
"""

import io
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tt_ckpt.files import DOWNLOAD, create, read_start, sync
from tt_ckpt.formats.pickle_records import MAX_BYTES, read_inert
from tt_ckpt.hf.weights import in_pieces
from tt_ckpt.mapped_file import release_mapped
from tt_ckpt.safetensors_file import DTYPES, TensorSpec, announced, is_shape
from tt_ckpt.shown import plain, quoted

_MAX_ENTRIES = 100_000
_DIRECTORY_BYTES = 8_000_000  # of an archive's list of entries, which takes a second to be read
_CURE = "save the model again as safetensors or as a plain state dict"
# all that a file of dense tensors calls; torch would allow more: tensors of any size, arrays of bytes, sets
_CALLED = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    "torch._utils._rebuild_parameter_with_state",
}
_STORAGE = re.compile(r"torch\.(?:storage\.)?[A-Z][A-Za-z0-9]*Storage")


class _NotArchive(ValueError):  # noqa: N818
    """A file of another kind, or part of one."""


class MappedTensors(dict[str, Tensor]):
    """Tensors by name, views of memory maps. The pages of one leave memory when the next is asked for.

    ``swapped``: the names of those whose bytes torch has put into the order of this machine, which stay in memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], swapped: Iterable[str] = ()) -> None:
        super().__init__(tensors)
        self.swapped = frozenset(swapped)
        self._last: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is not None:
            release_mapped(self._last)
        found = super().__getitem__(name)
        self._last = found if self._is_view(name, found) else None
        return found

    def _is_view(self, name: str, tensor: Tensor) -> bool:
        return tensor.is_contiguous() and name not in self.swapped

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor as ``in_pieces`` gives it; the pages of a piece leave memory when the next is asked for."""
        tensor = self[name]
        for piece in in_pieces(tensor):
            yield piece
            if self._is_view(name, tensor):
                release_mapped(piece)


def read_pickled(path: Path, *, allow_pickle: bool) -> MappedTensors:
    """The tensors of a file that ``torch.save`` wrote, as views of its memory map.

    ValueError for anything but a flat dict of dense tensors, and for a file whose pickle asks for code.
    """
    if not allow_pickle:
        raise ValueError(f"{path}: a pickle, which can run code when read; if you trust it: --allow-pickle")
    read_start(path)
    try:
        with path.open("rb") as file:
            order = _check_archive(file)
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _NotArchive as error:
        cure = f"cut short, or saved before torch 1.6; {DOWNLOAD}, or save it again"
        raise ValueError(f"{path}: not a torch archive ({error}): {cure}") from None
    except Exception as error:  # torch raises many kinds, and no other loader is tried
        raise ValueError(f"{path}: refused: not a plain file of tensors ({_reason(error)}); {_CURE}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}; {_CURE}")
    for name, tensor in content.items():
        _check_dense(path, name, tensor)
    return MappedTensors(content, swapped=content if order not in ("", sys.byteorder) else ())


def tensor_from_bytes(data: bytes, *, where: str) -> Tensor:
    """One tensor that ``torch.save`` put into these bytes."""
    try:
        _check_archive(io.BytesIO(data))
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{where}: refused: not a tensor ({_reason(error)}); {DOWNLOAD}") from None
    _check_dense(where, "it", tensor)
    assert isinstance(tensor, Tensor)
    return tensor


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return plain(lines[0][:160] if lines else type(error).__name__)


def _is_named(name: str) -> bool:
    return name in _CALLED or name in map(str, DTYPES.values()) or _STORAGE.fullmatch(name) is not None


class _Short:
    """A file of which at most ``limit`` bytes are read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.seekable, self._read = file.seek, file.tell, file.seekable, file.read
        self.limit = _DIRECTORY_BYTES

    def read(self, count: int = -1) -> bytes:
        data = self._read(count if 0 <= count <= self.limit else self.limit + 1)
        if len(data) > self.limit:
            raise ValueError(f"more than {self.limit} bytes of entries")
        return data


def _check_archive(file: IO[bytes]) -> str:
    """Refuse an archive that torch does not write: compressed, larger inside than outside, or not of dense tensors.

    Returns the order of bytes that it states; nothing if it states none, which torch reads as they are.
    """
    order = b""
    if file.read(4) != b"PK\x03\x04":  # torch reads anything else as its format before 1.6
        raise _NotArchive("it does not begin as one")
    try:
        short = _Short(file)
        with zipfile.ZipFile(short) as archive:
            short.limit = MAX_BYTES
            size = file.seek(0, io.SEEK_END)
            entries = archive.infolist()
            if len(entries) > _MAX_ENTRIES or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{len(entries)} entries or compressed ones, which torch does not write")
            if len({entry.filename for entry in entries}) != len(entries):
                raise ValueError("two of its entries have one name")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its entries overlap")
            for entry in entries:
                if entry.filename.endswith("byteorder") and entry.file_size < 10:
                    order = archive.read(entry)
                if entry.filename.endswith("data.pkl"):
                    if entry.file_size > MAX_BYTES:
                        raise ValueError(f"a pickle of {entry.file_size} bytes")
                    read_inert(archive.read(entry), _is_named, _CALLED.__contains__)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise _NotArchive(_reason(error)) from None
    return order.decode("ascii", "replace")


def _check_dense(path: object, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not name.isprintable() or len(name) > 1000:
        raise ValueError(f"{path}: expected names of tensors, found the key {quoted(name)}; {_CURE}")
    shown = plain(name)
    if not isinstance(tensor, Tensor):
        what = f"{shown} is a {type(tensor).__name__}, not a tensor: a training state, not a model?"
        raise ValueError(f"{path}: {what}; {_CURE}")
    dense = type(tensor.data) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.dtype not in DTYPES.values():
        what = f"{shown} is not a plain dense tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})"
        raise ValueError(f"{path}: {what}; {_CURE}")
    if not is_shape(list(tensor.shape)) or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {shown} is larger than its data; {DOWNLOAD}")


def write_pickled(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``{name: tensor}`` as ``torch.save`` does, but one tensor in memory at a time, and fsync it."""
    # Tensors that give the archive its form. Their memory is reserved but never touched, so none is used.
    hollow = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    with create(path) as file:
        with torch.serialization.skip_data():
            torch.save(hollow, file)
        del hollow
        file.flush()
        for offset, (name, spec) in zip(_data_offsets(path, len(specs)), specs.items(), strict=True):
            file.seek(offset)
            for piece in announced(path, name, spec, get(name)):
                file.write(piece)
            if progress:
                progress(spec.nbytes)
        sync(file)


def _data_offsets(path: Path, count: int) -> list[int]:
    """Where the bytes of ``<root>/data/0``, ``data/1``, ... begin. torch numbers storages in the order of the dict."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        offsets = []
        for number in range(count):
            start = entries[f"data/{number}"].header_offset
            raw.seek(start + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            offsets.append(start + 30 + name_length + extra_length)
    return offsets
