"""Rows from local files, with the place of each: jsonl, json, csv, parquet, arrow."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tt_data.compressed import UNPACKED, compression, open_binary
from tt_data.nulls import without_nulls

Row = dict[str, Any]
Placed = tuple[int, Row]  # the line (or row) number that a message names, and the row

_MAX_LINE = 64 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_NO_TEXT = {
    b"version https://git-lfs": "this is a git-lfs pointer, not the data; run git lfs pull",
    b"\x1f\x8b": "this is compressed by gzip; add .gz to its name",
    b"\xff\xfe": "this is UTF-16 text, expected UTF-8; save it as UTF-8",
    b"\xfe\xff": "this is UTF-16 text, expected UTF-8; save it as UTF-8",
    b"PAR1": "this is a parquet file; call it .parquet",
    b"PK\x03\x04": "this is a zip archive, not rows; unpack it",
}


def data_error(path: Path, line: int | None, text: str) -> ValueError:
    """``file:line: what is wrong``."""
    return ValueError(f"{path}{f':{line}' if line else ''}: {text}")


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


def _open(path: Path) -> BinaryIO:
    return open_binary(path, lambda text: data_error(path, None, text))


def _without_doubles(pairs: list[tuple[str, Any]]) -> Row:
    """JSON allows a key twice, and the first value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _constant(name: str) -> float | None:
    """NaN is how pandas writes what is missing."""
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_constant)


def read_jsonl(path: Path) -> Iterator[Placed]:
    """An object per line; empty lines are skipped. A file that is one document over many lines is read as .json."""
    if is_one_document(path):
        yield from read_json(path)
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = begin(path, line)
            if line.strip():
                yield number, parse_line(path, number, line)


def begin(path: Path, line: bytes) -> bytes:
    """The first line without its byte order mark. Raises ValueError for a file that is not UTF-8 text."""
    for mark, text in _NO_TEXT.items():
        if line.startswith(mark):
            raise data_error(path, None, text)
    return line.removeprefix(b"\xef\xbb\xbf")


def parse_line(path: Path, number: int, line: bytes) -> Row:
    """The object on one line. Raises ValueError with the column and the text around it."""
    if len(line) > _MAX_LINE:
        raise data_error(path, number, f"a line of {len(line)} bytes, expected at most {_MAX_LINE}")
    try:
        row = _DECODER.decode(line.rstrip(b"\r\n").decode("utf-8", "surrogatepass"))
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ").strip()
        raise ValueError(f"{path}:{number}:{error.colno}: broken JSON ({error.msg}) near {around!r}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}:{error.start + 1}: not UTF-8 (byte 0x{line[error.start]:02x})") from None
    except (RecursionError, ValueError) as error:
        raise data_error(path, number, f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise data_error(path, number, f"expected an object with columns, found {type(row).__name__}")
    return row


def is_one_document(path: Path) -> bool:
    """Whether the first line only opens an object or a list."""
    with _open(path) as stream:
        return stream.readline(64).removeprefix(b"\xef\xbb\xbf").strip() in (b"{", b"[")


def read_json(path: Path) -> Iterator[Placed]:
    """A list of objects, an object that holds such a list, one object, one conversation, or several of these, one
    behind the other; or jsonl in a file called .json."""
    with _open(path) as stream:
        first = begin(path, stream.readline())
        data = first + stream.read()
    if first.strip()[:1] == b"{" and data[len(first) :].strip() and _is_complete(first):
        del data
        yield from read_jsonl(path)
        return
    try:
        documents = list(_documents(data.decode("utf-8", "surrogatepass")))
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ").strip()
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: broken JSON ({error.msg}) near {around!r}") from None
    except UnicodeDecodeError as error:
        raise data_error(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise data_error(path, None, f"broken JSON ({error})") from None
    numbered = enumerate(_rows_of(documents[0][1]), 1) if len(documents) == 1 else documents
    for number, row in numbered:
        if not isinstance(row, dict):
            raise data_error(path, None, f"row {number}: expected an object with columns, found {type(row).__name__}")
        yield number, row


def _documents(text: str) -> Iterator[tuple[int, Any]]:
    """The JSON values in ``text``, one behind the other, and the line that each begins at."""
    position, line = 0, 1
    while True:
        start = _BLANK.match(text, position).end()  # type: ignore[union-attr]
        if position and start == len(text):
            return
        line += text.count("\n", position, start)
        value, position = _DECODER.raw_decode(text, start)
        yield line, value
        line += text.count("\n", start, position)


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
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_csv(path: Path) -> Iterator[Placed]:
    """A header line, then a row per record; every value is text, but NaN, as pandas may write it, is null."""
    delimiter = "\t" if file_kind(path) == ".tsv" else ","
    with _open(path) as binary:
        begin(path, binary.read(64))
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(_MAX_LINE)
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)  # an open quote must not swallow the rest
        start = 2
        try:
            twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise data_error(path, 1, f"two columns are called {twice[0]!r}")
            _refuse_separator(path, reader.fieldnames or (), delimiter)
            for row in reader:
                if None in row or None in row.values():
                    count = len(row.get(None, ())) + sum(v is not None for k, v in row.items() if k is not None)
                    wanted = len(reader.fieldnames or ())
                    raise data_error(path, start, f"{count} values, but the header has {wanted} columns")
                yield start, {name: None if value in ("NaN", "nan") else value for name, value in row.items()}
                start = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise data_error(path, start, f"not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise data_error(path, start, f"broken csv ({error})") from None


def _refuse_separator(path: Path, names: Sequence[str], delimiter: str) -> None:
    """One column whose name holds another separator is a file of another kind."""
    others = [mark for mark in (";", "\t", ",", "|") if mark != delimiter and len(names) == 1 and mark in names[0]]
    if others:
        cure = {"\t": "call it .tsv", ",": "call it .csv"}.get(others[0], "save it with commas")
        found = f"one column called {names[0]!r}: its separator is {others[0]!r}, expected {delimiter!r}"
        raise data_error(path, 1, f"{found}; {cure}")


def read_parquet(path: Path, start: int = 0) -> Iterator[Placed]:
    """Record batches, one at a time, from row ``start``; row groups before it are not read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= start:
                    number += size
                    continue
                for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        if number > start:
                            yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise data_error(path, None, f"not a whole parquet file ({_one_line(error)})") from None


def read_arrow(path: Path) -> Iterator[Placed]:
    """An Arrow file or stream, as ``datasets`` writes them."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise data_error(path, None, f"not a whole arrow file ({_one_line(error)})") from None


READERS: Mapping[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
