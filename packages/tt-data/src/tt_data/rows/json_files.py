"""Rows from local files, with the place of each: jsonl, json, csv, parquet, arrow."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tt_data.rows.data_files import (
    MAX_COLUMNS,
    MAX_LINE,
    UNPACKED,
    begin,
    check_columns,
    compression,
    data_error,
    lines_of,
    open_data,
    size_on_disk,
)
from tt_data.rows.tables import Placed, Row, read_arrow, read_csv, read_parquet
from tt_data.wording import names_of

MAX_DEPTH = 100  # of lists and objects in each other
_BLANK = re.compile(r"[ \t\r\n]*")
_HEAD = 1 << 16
_MAX_DOCUMENT = 4 << 30  # bytes of a file that is read at once
_MAX_UNPACKED, _MAX_RATIO = 32 << 20, 50  # of a compressed one, if they are more than that many times those on disk


def read_rows(path: Path) -> Iterator[Placed]:
    """The rows of one file. Raises ValueError with file:line:column for what cannot be read."""
    kind = file_kind(path)
    if kind is None:
        raise data_error(path, None, f"unknown kind of file, expected one of {', '.join(sorted(READERS))}")
    yield from READERS[kind](path)


def file_kind(path: Path) -> str | None:
    """``.jsonl`` for ``rows.jsonl`` and ``rows.jsonl.gz``; None if no reader knows the ending."""
    packed = compression(path)
    suffix = (Path(path.stem).suffix if packed else path.suffix).lower()
    return suffix if suffix in READERS and not (packed and suffix in UNPACKED) else None


def read_jsonl(path: Path) -> Iterator[Placed]:
    """An object per line; empty lines are skipped. A file that is one document over many lines is read as .json."""
    if is_one_document(path):
        yield from read_json(path)
        return
    with open_data(path) as stream:
        for number, line in lines_of(path, stream):
            if number == 1:
                line = begin(path, line)
            if not line.isspace():
                yield number, parse_line(path, number, line)


def parse_line(path: Path, number: int, line: bytes) -> Row:
    """The object on one line. Raises ValueError with the column and the text around it."""
    try:
        text = line.rstrip(b"\r\n").decode("utf-8", "surrogatepass")
        row, end = decode_json(text, 0 if text.startswith("{") else _blank(text, 0))
        if end != len(text) and _blank(text, end) != len(text):
            raise json.JSONDecodeError("Extra data", text, _blank(text, end))
    except UnicodeDecodeError as error:
        place = f"{number}:{error.start + 1}"
        raise data_error(path, place, f"not UTF-8 (byte 0x{line[error.start]:02x}); save it as UTF-8") from None
    except ValueError as error:
        raise json_error(path, number, error) from None
    if not isinstance(row, dict):
        raise data_error(path, number, f"expected an object with columns, found {type(row).__name__}")
    if len(row) > MAX_COLUMNS:
        check_columns(path, number, len(row))
    return row


def is_one_document(path: Path) -> bool:
    """Whether the first line only opens an object or a list."""
    with open_data(path) as stream:
        return stream.readline(64).removeprefix(b"\xef\xbb\xbf").strip() in (b"{", b"[")


def read_json(path: Path) -> Iterator[Placed]:
    """A list of objects, an object that holds such a list, one object, one conversation, or several of these, one
    after the other; or jsonl in a file called .json."""
    with open_data(path) as stream:
        first = begin(path, stream.readline(MAX_LINE))
        if first.strip()[:1] not in (b"{", b"[", b""):
            raise data_error(path, 1, f"broken JSON (expected an object or a list) near {first[:20]!r}; correct it")
        is_jsonl = first.strip()[:1] == b"{" and _is_complete(first) and bool(stream.read(_HEAD).strip())
    if is_jsonl:
        yield from read_jsonl(path)
        return
    try:
        documents = _documents(path)
    except MemoryError:
        raise data_error(path, None, "too large for one JSON document; write a row per line as .jsonl") from None
    numbered = enumerate(_rows_of(documents[0][1]), 1) if len(documents) == 1 else documents
    for number, row in numbered:
        if not isinstance(row, dict):
            raise data_error(path, None, f"row {number}: expected an object with columns, found {type(row).__name__}")
        check_columns(path, None, len(row))
        yield number, row


def _document(path: Path) -> str:
    """All of a file, or of what is packed in it."""
    packed = compression(path) is not None
    limit = max(_MAX_UNPACKED, _MAX_RATIO * size_on_disk(path)) if packed else _MAX_DOCUMENT
    with open_data(path) as stream:
        data = _read(stream, limit)
    if len(data) > limit:
        raise data_error(path, None, f"more than {limit:,} bytes in one JSON document; write a row per line as .jsonl")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise data_error(path, line, f"not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None


def _read(stream: BinaryIO, limit: int) -> bytes:
    """At most one byte more than ``limit``; a buffer of the limit's size is not made."""
    parts, size = [], 0
    while size <= limit and (part := stream.read(min(1 << 24, limit + 1 - size))):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _blank(text: str, start: int) -> int:
    """Where the white space from ``start`` on ends."""
    return _BLANK.match(text, start).end()  # type: ignore[union-attr]


def _documents(path: Path) -> list[tuple[int, Any]]:
    """The JSON values in a file, one after the other, each with the line where it begins."""
    text = _document(path)
    found: list[tuple[int, Any]] = []
    start, line = _blank(text, 0), 1 + text.count("\n", 0, _blank(text, 0))
    while not found or start < len(text):
        try:
            value, end = decode_json(text, start)
        except ValueError as error:
            raise json_error(path, 1 if isinstance(error, json.JSONDecodeError) else line, error) from None
        found.append((line, value))
        end = _blank(text, end)
        line += text.count("\n", start, end)
        start = end
    return found


def _rows_of(value: Any) -> list[Any]:
    """The rows of one JSON document."""
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        holds_rows = len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) and not _are_turns(lists[0])
        return lists[0] if holds_rows else [value]
    if not isinstance(value, list):
        return [value]
    if _are_turns(value):
        return [{"messages": value}]
    return [{"messages": item} if isinstance(item, list) and _are_turns(item) else item for item in value]


def _are_turns(items: list[Any]) -> bool:
    """Whether these are the messages of one conversation."""
    return bool(items) and all(
        isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
        for item in items
    )


def _is_complete(line: bytes) -> bool:
    try:
        return isinstance(load_json(line.decode("utf-8", "replace")), dict)
    except ValueError:
        return False


READERS: Mapping[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


# ---- JSON --------------------------------------------------------------------------------------------------------


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a key twice, and the first value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {names_of([twice])} appears twice")
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
