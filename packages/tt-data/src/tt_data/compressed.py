"""Files that are compressed: opened for reading, with one kind of error for those that are not whole."""

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

KINDS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
UNREAD = (".lz4", ".lzma", ".br", ".z", ".sz", ".snappy", ".lzo", ".zip", ".7z", ".tar", ".tgz", ".rar")
UNPACKED = (".parquet", ".arrow")  # compressed inside: never as whole files
_OPEN: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
_CHUNK = 1 << 18
Explain = Callable[[str], Exception]


def compression(path: Path) -> str | None:
    """``gzip`` for ``rows.jsonl.gz`` and ``ROWS.JSONL.GZ``; None for a file that is not compressed."""
    return KINDS.get(path.suffix.lower())


def is_unread(path: Path) -> bool:
    """Whether ``path`` is compressed in a way that is not read here."""
    return path.suffix.lower() in UNREAD


def open_binary(path: Path, explain: Explain) -> BinaryIO:
    """The content, unpacked. What is wrong with the compressed file is raised as ``explain(text)`` when it is read."""
    kind = compression(path)
    if kind is None:
        return path.open("rb")
    stream: Any = _OPEN[kind](path) if kind in _OPEN else _open_zstd(path, explain)
    return cast(BinaryIO, io.BufferedReader(_Explained(stream, kind, explain), _CHUNK))


def _open_zstd(path: Path, explain: Explain) -> Any:
    if find_spec("compression") is not None:  # Python 3.14
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.open(path, "rb")
    if find_spec("zstandard") is None:
        raise explain(
            "compressed by zstd, which this Python cannot read; pip install zstandard, or unpack it (zstd -d)"
        )
    return _ZstdFile(path)


class _Explained(io.RawIOBase):
    """A decompressing stream whose errors are the caller's."""

    def __init__(self, stream: Any, kind: str, explain: Explain) -> None:
        self._stream, self._kind, self._explain = stream, kind, explain

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise self._explain(f"not a whole {self._kind} file ({' '.join(str(error).split())[:200]})") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _ZstdFile:
    """The frames of a zstd file. The zstandard package's own reader takes a file that was cut for a whole one."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._begun = False
        self._ready = memoryview(b"")

    def read(self, size: int) -> memoryview:
        while not self._ready:
            left = b""
            if self._frame.eof:
                left, self._frame, self._begun = self._frame.unused_data, self._new(), False
            data = left or self._file.read(_CHUNK)
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
        self._file.close()
