"""What all readers of rows share: errors with a place, lines of limited length, JSON of limited depth."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tt_data.files import stand_in
from tt_data.rows.compressed import open_binary
from tt_data.wording import names_of, visible

MAX_LINE = 16 << 20  # bytes of a line, which is a row: millions of tokens
MAX_DEPTH = 100  # of lists and objects in each other
MAX_COLUMNS = 2000
_MAX_EMPTY = 1_000_000  # lines one behind the other
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


def open_data(path: Path) -> BinaryIO:
    """The content of a data file, unpacked. (Where its links may lead was seen to in ``folders``.)"""
    return open_binary(path, lambda text: data_error(path, None, text))


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


def check_columns(path: Path, line: int | None, count: int) -> None:
    """Raise ValueError for more columns than rows of text have."""
    if count > MAX_COLUMNS:
        raise data_error(path, line, f"{count:,} columns, expected at most {MAX_COLUMNS:,}; leave out those not needed")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a key twice, and the first value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {names_of([twice])} is there twice")
    return found


def _constant(name: str) -> float | None:
    """NaN is how pandas writes what is missing."""
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_constant)


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value in ``text`` from ``start`` on, and where it ends. Raises JSONDecodeError, or ValueError for what
    Python or the readers of rows cannot take."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (RecursionError, ValueError) as error:
        raise _explained(error) from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
        refuse_deep(value)
    return value, end


def load_json(text: str) -> Any:
    """The value that is all of ``text``; of a key given twice the last one counts. Raises ValueError."""
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise _explained(error) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        refuse_deep(value)
    return value


_DEEP = f"lists and objects more than {MAX_DEPTH} deep in each other"


def _explained(error: Exception) -> ValueError:
    if isinstance(error, RecursionError):
        return ValueError(_DEEP)
    if isinstance(error, json.JSONDecodeError):
        return error
    said = str(error).partition("; use sys")[0]  # of a number with more digits than Python reads
    return ValueError(f"{said}; write it as text" if said.startswith("Exceeds") else said)


def refuse_deep(value: Any) -> None:
    """Raise ValueError for a value deeper than ``MAX_DEPTH``."""
    if _depth(value) > MAX_DEPTH:
        raise ValueError(_DEEP)


def _depth(value: Any) -> int:
    """How deep lists and objects are in each other; just over ``MAX_DEPTH`` for what is deeper."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(item, (dict, list))
        ]
    return depth


def json_error(path: Path, line: int, error: ValueError) -> ValueError:
    """A row that ``decode_json`` refused, with its place. Of a JSONDecodeError ``line`` is that before its text."""
    if not isinstance(error, json.JSONDecodeError):
        return data_error(path, line or None, f"broken JSON ({error}){'' if ';' in str(error) else '; correct it'}")
    around = error.doc[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ").strip()
    cure = "write a row per line" if error.msg == "Extra data" else "correct it"
    place = f"{line + error.lineno - 1}:{error.colno}"
    return data_error(path, place, f"broken JSON ({error.msg}) near {around!r}; {cure}")


def size_on_disk(path: Path) -> int:
    """Bytes of a file, of the target of a link."""
    return path.stat().st_size
