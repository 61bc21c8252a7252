"""How data files are opened: unpacked, line by line, with limits, and with errors that name the place."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from tt_data.files import open_regular, stand_in
from tt_data.wording import said, visible

MAX_LINE = 16 << 20  # bytes of a line, which is a row: millions of tokens
MAX_COLUMNS = 2000
KINDS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
UNREAD = (".lz4", ".lzma", ".br", ".z", ".sz", ".snappy", ".lzo", ".zip", ".7z", ".tar", ".tgz", ".rar")
UNPACKED = (".parquet", ".arrow")  # compressed inside: never as whole files
_CHUNK = 1 << 18
_PACKED_CHUNK = 1 << 12  # which zstd may unpack to 128 MB
_MEMORY = 1 << 29  # bytes that unpacking may take
_MAX_EMPTY = 1_000_000  # lines in a row
_NO_TEXT = {
    b"\x1f\x8b": "this is compressed by gzip; add .gz to its name",
    b"\xff\xfe": "this is UTF-16 text, expected UTF-8; save it as UTF-8",
    b"\xfe\xff": "this is UTF-16 text, expected UTF-8; save it as UTF-8",
    b"PAR1": "this is a parquet file; call it .parquet",
    b"ARROW1": "this is an arrow file; call it .arrow",
    b"PK\x03\x04": "this is a zip archive, not rows; unpack it",
    b"\x28\xb5\x2f\xfd": "this is compressed by zstd; add .zst to its name",
    b"\xfd7zXZ\0": "this is compressed by xz; add .xz to its name",
    b"BZh": "this is compressed by bz2; add .bz2 to its name",
}


def data_error(path: Path, line: int | str | None, text: str) -> ValueError:
    """``file:line: what is wrong``."""
    return ValueError(f"{visible(str(path))}{f':{line}' if line else ''}: {visible(text, 1000)}")


def check_columns(path: Path, line: int | None, count: int) -> None:
    """Raise ValueError for more columns than rows of text have."""
    if count > MAX_COLUMNS:
        raise data_error(path, line, f"{count:,} columns, expected at most {MAX_COLUMNS:,}; leave out those not needed")


def size_on_disk(path: Path) -> int:
    """Bytes of a file, of the target of a link."""
    return path.stat().st_size


def lines_of(path: Path, stream: BinaryIO, number: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines from the one called ``number`` on, empty ones too. Raises ValueError for one that is too long."""
    empty = 0
    for place, line in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), number):
        if len(line) > MAX_LINE:
            raise data_error(path, place, f"a line of more than {MAX_LINE:,} bytes; a row is one line, so split it")
        if len(line) > 2:
            empty = 0
        elif line.isspace() and (empty := empty + 1) > _MAX_EMPTY:
            raise data_error(path, place, f"more than {_MAX_EMPTY:,} empty lines, expected rows; remove them")
        yield place, line


def begin(path: Path, line: bytes) -> bytes:
    """The first line without its byte order mark. Raises ValueError for a file that is not UTF-8 text."""
    if found := stand_in(line):
        raise data_error(path, None, found)
    for mark, text in _NO_TEXT.items():
        if line.startswith(mark):
            raise data_error(path, None, text)
    return line.removeprefix(b"\xef\xbb\xbf")


# ---- compressed files --------------------------------------------------------------------------------------------


def compression(path: Path) -> str | None:
    """``gzip`` for ``rows.jsonl.gz`` and ``ROWS.JSONL.GZ``; None for a file that is not compressed."""
    return KINDS.get(path.suffix.lower())


def is_unread(path: Path) -> bool:
    """Whether ``path`` is compressed in a way that is not read here."""
    return path.suffix.lower() in UNREAD


def open_data(path: Path) -> BinaryIO:
    """The content of a data file, unpacked. What is wrong with a compressed file is a ValueError when it is read.

    Where the links of the file may lead was checked in ``folders``.
    """
    file = open_regular(Path(os.path.realpath(path)))
    kind = compression(path)
    if kind is None:
        return file
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
