"""Compressed data files, unpacked within limits; and errors that name the place in a data file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from tt_data.wording import said, visible

MAX_COLUMNS = 2000
KINDS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
UNREAD = (".lz4", ".lzma", ".br", ".z", ".sz", ".snappy", ".lzo", ".zip", ".7z", ".tar", ".tgz", ".rar")
COMPRESSED = (*KINDS, *UNREAD)
UNPACKED = (".parquet", ".arrow")  # compressed inside: never as whole files
_CHUNK = 1 << 18
_PACKED_CHUNK = 1 << 12  # which zstd may unpack to 128 MB
_MEMORY = 1 << 29  # bytes that unpacking may take


def data_error(path: Path, line: int | str | None, text: str) -> ValueError:
    """``file:line: what is wrong``."""
    return ValueError(f"{visible(str(path))}{f':{line}' if line else ''}: {visible(text, 1000)}")


def check_columns(path: Path, line: int | None, count: int) -> None:
    """Raise ValueError for more columns than rows of text have."""
    if count > MAX_COLUMNS:
        raise data_error(path, line, f"{count:,} columns, expected at most {MAX_COLUMNS:,}; leave out those not needed")


def unpacked(path: Path, file: BinaryIO, kind: str) -> BinaryIO:
    """The content of ``file``, compressed as ``kind``. What is wrong with it is a ValueError when it is read."""
    try:
        stream = _unpacked(path, file, kind)
    except BaseException:
        file.close()
        raise
    return cast(BinaryIO, io.BufferedReader(_Explained(stream, file, kind, path), _CHUNK))


def _unpacked(path: Path, file: BinaryIO, kind: str) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if kind == "bz2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return _Frames(file, lambda: lzma.LZMADecompressor(memlimit=_MEMORY), lzma.LZMAError)
    if find_spec("compression") is not None:  # Python 3.14
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.open(file, "rb")
    if find_spec("zstandard") is None:
        cure = "pip install zstandard, or unpack it (zstd -d)"
        raise data_error(path, None, f"compressed by zstd, which this Python cannot read; {cure}")
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_MEMORY)
    return _Frames(file, unpacker.decompressobj, zstandard.ZstdError)


class _Explained(io.RawIOBase):
    """A decompressing stream whose errors name the file."""

    def __init__(self, stream: Any, file: BinaryIO, kind: str, path: Path) -> None:
        self._stream, self._file, self._kind, self._path = stream, file, kind, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            text = f"not a whole {self._kind} file ({said(error)}); compress or download it again"
            raise data_error(self._path, None, text) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


class _Frames:
    """The frames (streams) of a zstd or xz file, one after the other, unpacked in small pieces.

    The zstandard package's own reader accepts a file that was cut short, and Python's lzma uses any amount of memory.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any], error: type[Exception]) -> None:
        self._file, self._new, self._error = file, new, error
        self._frame = new()
        self._begun = False
        self._ready = memoryview(b"")

    def read(self, size: int) -> memoryview:
        while not self._ready:
            left = b""
            if self._frame.eof:
                left, self._frame, self._begun = self._frame.unused_data.lstrip(b"\0"), self._new(), False
            data = left or self._file.read(_PACKED_CHUNK)
            if not data and self._begun:
                raise EOFError("the file ended before the end of a frame")
            if not data:
                break
            self._begun = True
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise ValueError(str(error)) from None
        taken, self._ready = self._ready[:size], self._ready[size:]
        return taken

    def close(self) -> None:
        self._ready = memoryview(b"")
