"""The only module that reads or writes pickles: ``.pth``, ``.pt`` and ``.bin`` files of tensors.

Reading needs the caller's ``allow_pickle`` and then uses torch's restricted unpickler on memory-mapped files, never
the full one. What is written holds a dict of tensors and nothing else.
"""

import io
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.commit import EarlySync
from tt_ckpt.files import create, read_start, sync
from tt_ckpt.tensor_file import DTYPES, TensorSpec, byte_views, spec_of

_MAX_ENTRIES = 200_000


class RefusedArchive(ValueError):  # noqa: N818
    """An archive of a form that torch does not write."""


def read_pickled(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, as views of its memory map.

    Anything but a flat dict of dense tensors is a ValueError, as is a file whose pickle asks for code.
    """
    if not allow_pickle:
        raise ValueError(f"{path}: a pickle, which can run code when read; if you trust it: --allow-pickle")
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds; none may pass for a model, and no other loader is tried
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else _first_line(error)
        raise ValueError(f"{path}: refused: not a plain file of tensors ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    for name, tensor in content.items():
        _check_dense(path, name, tensor)
    return content


def tensor_from_bytes(data: bytes, *, where: str) -> Tensor:
    """One tensor that ``torch.save`` put into these bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_entries(archive, where, len(data))
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{where}: refused: not a tensor ({_first_line(error)})") from None
    _check_dense(where, "it", tensor)
    assert isinstance(tensor, Tensor)
    return tensor


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _check_archive(path: Path) -> None:
    """An archive as torch writes it: stored, not compressed, and no larger inside than outside."""
    read_start(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, path, path.stat().st_size)
    except RefusedArchive:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: no torch archive ({_first_line(error)}): cut short, or saved before torch 1.6; download it again"
        ) from None


def _check_entries(archive: zipfile.ZipFile, where: object, nbytes: int) -> None:
    entries = archive.infolist()
    if len(entries) > _MAX_ENTRIES or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise RefusedArchive(f"{where}: refused: {len(entries)} entries or compressed ones, which torch does not write")
    if sum(entry.file_size for entry in entries) > nbytes:
        raise RefusedArchive(f"{where}: refused: its entries overlap")


def _check_dense(path: object, name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{path}: expected names of tensors, found the key {name!r:.80}")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor: a training state, not a model?")
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in DTYPES.values():
        raise ValueError(f"{path}: {name} is no plain dense tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {name} is larger than its data")


def write_pickled(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``{name: tensor}`` as ``torch.save`` does, but one tensor in memory at a time, and fsync it."""
    # Tensors that give the archive its form. Their memory is reserved but never touched, so there is none behind it.
    hollow = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    with create(path) as file, EarlySync(file) as early:
        with torch.serialization.skip_data():
            torch.save(hollow, file)
        del hollow
        file.flush()
        for offset, (name, spec) in zip(_data_offsets(path, len(specs)), specs.items(), strict=True):
            tensor = get(name)
            if spec_of(tensor) != spec:
                raise ValueError(f"{path}: tensor {name!r} is {spec_of(tensor)}, announced as {spec}")
            file.seek(offset)
            for piece in byte_views(tensor):
                file.write(piece)
                early.wrote(len(piece))
            if progress:
                progress(spec.nbytes)
        early.wait()
        sync(file)


def _data_offsets(path: Path, count: int) -> list[int]:
    """Where the bytes of ``<root>/data/0``, ``data/1``, ... begin: torch numbers storages in the order of the dict."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        offsets = []
        for number in range(count):
            start = entries[f"data/{number}"].header_offset
            raw.seek(start + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            offsets.append(start + 30 + name_length + extra_length)
    return offsets
