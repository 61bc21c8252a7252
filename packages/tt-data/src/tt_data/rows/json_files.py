"""Rows of jsonl and json files, with the place of each; and how any text file of rows is opened."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tt_data.files import BOM, open_regular, stand_in
from tt_data.rows.data_files import KINDS, MAX_COLUMNS, UNPACKED, check_columns, data_error, unpacked
from tt_data.rows.json_values import MAX_DEPTH, json_error, load_json, refuse_deep
from tt_data.wording import names_of

Row = dict[str, Any]
Placed = tuple[int, Row]  # the line (or row) number that a message names, and the row
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # of files of rows
MAX_LINE = 16 << 20  # bytes of a line, which is a row: millions of tokens
_MAX_EMPTY = 1_000_000  # lines in a row
_BLANK = re.compile(r"[ \t\r\n]*")
_HEAD = 1 << 16
_MAX_DOCUMENT = 4 << 30  # bytes of a file that is read at once
_MAX_UNPACKED, _MAX_RATIO = 32 << 20, 50  # of a compressed one, if they are more than that many times those on disk


def file_kind(path: Path) -> str | None:
    """``.jsonl`` for ``rows.jsonl`` and ``rows.jsonl.gz``; None if no reader knows the ending."""
    suffix = path.suffix.lower()
    if suffix in KINDS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in ENDINGS and suffix not in UNPACKED else None
    return suffix if suffix in ENDINGS else None


def open_data(path: Path) -> BinaryIO:
    """The content of a data file, unpacked. Where its links may lead was checked in ``folders``."""
    file = open_regular(Path(os.path.realpath(path)))
    kind = KINDS.get(path.suffix.lower())
    return file if kind is None else unpacked(path, file, kind)


def lines_of(path: Path, stream: BinaryIO, number: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines from the one called ``number`` on, empty ones too. Raises ValueError for one that is too long, and if
    the first one is not UTF-8 text."""
    empty = 0
    for place, line in enumerate(iter(partial(stream.readline, MAX_LINE + 1), b""), number):
        if len(line) > MAX_LINE:
            raise data_error(path, place, f"a line of more than {MAX_LINE:,} bytes; a row is one line, so split it")
        if place == 1:
            if found := stand_in(line, text=True):
                raise data_error(path, None, found)
            line = line.removeprefix(BOM)
        if len(line) > 2:
            empty = 0
        elif line.isspace() and (empty := empty + 1) > _MAX_EMPTY:
            raise data_error(path, place, f"more than {_MAX_EMPTY:,} empty lines, expected rows; remove them")
        yield place, line


def read_jsonl(path: Path) -> Iterator[Placed]:
    """An object per line; empty lines are skipped. A file that is one document over many lines is read as .json."""
    with open_data(path) as stream:
        for number, line in lines_of(path, stream):
            if number == 1 and line.strip() in DOCUMENT:
                break
            if not line.isspace():
                yield number, parse_line(path, number, line)
        else:
            return
    yield from read_json(path)


DOCUMENT = (b"{", b"[")  # the first line of a file that is one document


def parse_line(path: Path, number: int, line: bytes) -> Row:
    """The object on one line. Raises ValueError with the column and the text around it."""
    try:
        text = line.rstrip(b"\r\n").decode("utf-8", "surrogatepass")
        row, end = _DECODER.raw_decode(text, 0 if text.startswith("{") else _blank(text, 0))
        if text.count("[") + text.count("{") > MAX_DEPTH:
            refuse_deep(row)
        if end != len(text) and _blank(text, end) != len(text):
            raise json.JSONDecodeError("Extra data", text, _blank(text, end))
    except UnicodeDecodeError as error:
        place = f"{number}:{error.start + 1}"
        raise data_error(path, place, f"not UTF-8 (byte 0x{line[error.start]:02x}); save it as UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise json_error(path, number, error) from None
    if not isinstance(row, dict):
        raise data_error(path, number, f"expected an object with columns, found {type(row).__name__}")
    if len(row) > MAX_COLUMNS:
        check_columns(path, number, len(row))
    return row


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


def read_json(path: Path) -> Iterator[Placed]:
    """A list of objects, an object that holds such a list, one object, one conversation, or several of these, one
    after the other; or jsonl in a file called .json."""
    with open_data(path) as stream:
        first = stream.readline(MAX_LINE)
        if found := stand_in(first, text=True):
            raise data_error(path, None, found)
        first = first.removeprefix(BOM)
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
    packed = path.suffix.lower() in KINDS
    limit = max(_MAX_UNPACKED, _MAX_RATIO * path.stat().st_size) if packed else _MAX_DOCUMENT
    with open_data(path) as stream:
        data = _read(stream, limit)
    if len(data) > limit:
        raise data_error(path, None, f"more than {limit:,} bytes in one JSON document; write a row per line as .jsonl")
    try:
        return data.removeprefix(BOM).decode("utf-8", "surrogatepass")
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
            value, end = _DECODER.raw_decode(text, start)
            if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
                refuse_deep(value)
        except (RecursionError, ValueError) as error:
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
