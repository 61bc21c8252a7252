"""Files that are compressed: opened for reading, with one kind of error for those that are not whole."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from tt_data.files import open_regular
from tt_data.wording import said

KINDS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
UNREAD = (".lz4", ".lzma", ".br", ".z", ".sz", ".snappy", ".lzo", ".zip", ".7z", ".tar", ".tgz", ".rar")
UNPACKED = (".parquet", ".arrow")  # compressed inside: never as whole files
_CHUNK = 1 << 18
_PACKED_CHUNK = 1 << 12  # which zstd may unpack to 128 MB
_MEMORY = 1 << 29  # bytes that unpacking may take
Explain = Callable[[str], Exception]


def compression(path: Path) -> str | None:
    """``gzip`` for ``rows.jsonl.gz`` and ``ROWS.JSONL.GZ``; None for a file that is not compressed."""
    return KINDS.get(path.suffix.lower())


def is_unread(path: Path) -> bool:
    """Whether ``path`` is compressed in a way that is not read here."""
    return path.suffix.lower() in UNREAD


def open_binary(path: Path, explain: Explain) -> BinaryIO:
    """The content, unpacked. What is wrong with the compressed file is raised as ``explain(text)`` when it is read."""
    file = open_regular(Path(os.path.realpath(path)))
    kind = compression(path)
    if kind is None:
        return file
    try:
        stream = _unpacked(file, kind, explain)
    except BaseException:
        file.close()
        raise
    return cast(BinaryIO, io.BufferedReader(_Explained(stream, file, kind, explain), _CHUNK))


def _unpacked(file: BinaryIO, kind: str, explain: Explain) -> Any:
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
        raise explain(
            "compressed by zstd, which this Python cannot read; pip install zstandard, or unpack it (zstd -d)"
        )
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_MEMORY)
    return _Frames(file, unpacker.decompressobj, zstandard.ZstdError)


class _Explained(io.RawIOBase):
    """A decompressing stream whose errors are the caller's."""

    def __init__(self, stream: Any, file: BinaryIO, kind: str, explain: Explain) -> None:
        self._stream, self._file, self._kind, self._explain = stream, file, kind, explain

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise self._explain(
                f"not a whole {self._kind} file ({said(error)}); compress or download it again"
            ) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


class _Frames:
    """The frames (streams) of a zstd or xz file, one behind the other, unpacked a little at a time.

    The zstandard package's own reader takes a file that was cut for a whole one; Python's lzma takes any memory.
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
