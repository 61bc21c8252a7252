"""Rows from local files, with the place of each: jsonl, json, csv, parquet, arrow, directories."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, cast

Row = dict[str, Any]
Placed = tuple[int, Row]  # the line (or row) number that a message names, and the row

_MAX_LINE = 64 << 20


def data_error(path: Path, line: int | None, text: str) -> ValueError:
    """``file:line: what is wrong``."""
    return ValueError(f"{path}{f':{line}' if line else ''}: {text}")


def read_rows(path: Path) -> Iterator[Placed]:
    """The rows of one file. Raises ValueError with file:line:column for what cannot be read."""
    kind = file_kind(path)
    if kind is None:
        raise data_error(path, None, f"unknown kind of file, expected one of {', '.join(sorted(READERS))}")
    return READERS[kind](path)


def file_kind(path: Path) -> str | None:
    """``.jsonl`` for ``rows.jsonl`` and ``rows.jsonl.gz``; None where no reader knows the ending."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in READERS else None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def read_jsonl(path: Path) -> Iterator[Placed]:
    """An object per line; empty lines are skipped."""
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                _refuse_pointer(path, line)
            if line.strip():
                yield number, parse_line(path, number, line)


def parse_line(path: Path, number: int, line: bytes) -> Row:
    """The object on one line. Raises ValueError with the column and the text around it."""
    if len(line) > _MAX_LINE:
        raise data_error(path, number, f"a line of {len(line)} bytes, expected at most {_MAX_LINE}")
    try:
        row = json.loads(line.rstrip(b"\r\n"))
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


def read_json(path: Path) -> Iterator[Placed]:
    """A list of objects, or one object that holds such a list, or jsonl in a file called .json."""
    with _open(path) as stream:
        first = stream.readline().removeprefix(b"\xef\xbb\xbf").strip()
        _refuse_pointer(path, first)
        rest = stream.read()
        if first[:1] == b"{" and rest.strip() and _is_complete(first):
            del rest
            yield from read_jsonl(path)
            return
        stream.seek(0)
        data = stream.read()
    try:
        found = json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except json.JSONDecodeError as error:
        around = error.doc[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ").strip()
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: broken JSON ({error.msg}) near {around!r}") from None
    except UnicodeDecodeError as error:
        raise data_error(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise data_error(path, None, f"broken JSON ({error})") from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else [found]
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        if not isinstance(row, dict):
            raise data_error(path, None, f"row {number}: expected an object with columns, found {type(row).__name__}")
        yield number, row


def _is_complete(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_csv(path: Path) -> Iterator[Placed]:
    """A header line, then a row per record; every value is text."""
    delimiter = "\t" if file_kind(path) == ".tsv" else ","
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(_MAX_LINE)
        reader = csv.DictReader(stream, delimiter=delimiter)
        start = 2
        try:
            for row in reader:
                if None in row or None in row.values():
                    count = len(row.get(None, ())) + sum(v is not None for k, v in row.items() if k is not None)
                    wanted = len(reader.fieldnames or ())
                    raise data_error(path, start, f"{count} values, but the header has {wanted} columns")
                yield start, row
                start = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise data_error(path, start, f"not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise data_error(path, start, f"broken csv ({error})") from None


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
                            yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
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
                    yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
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


def _refuse_pointer(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise data_error(path, None, "this is a git-lfs pointer, not the data; run git lfs pull")


def local_files(path: Path, split: str | None) -> list[Path]:
    """The data files that ``path`` (a file or a directory) means. Raises FileNotFoundError or ValueError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()}){_near_file(path)}")
    files = sorted(p for p in path.rglob("*") if p.is_file() and file_kind(p) and not p.name.startswith((".", "_")))
    files = [p for p in files if p.name not in ("dataset_info.json", "state.json", "dataset_dict.json")]
    if not files:
        raise ValueError(f"{path}: no data file in this directory, expected one of {', '.join(sorted(READERS))}")
    names = {_split_of(file.relative_to(path)) for file in files}
    if split is None and "train" in names and names & {"test", "eval", "dev", "valid", "validation"}:
        split = "train"
    return files if split is None else _of_split(path, files, split)


def _of_split(path: Path, files: list[Path], split: str) -> list[Path]:
    names = {file: _split_of(file.relative_to(path)) for file in files}
    chosen = [file for file, name in names.items() if name == split]
    if not chosen:
        known = sorted({name for name in names.values() if name})
        near = get_close_matches(split, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path}: no split {split!r}, expected one of {known or 'no splits here'}{hint}")
    return chosen


def _split_of(file: Path) -> str:
    """``train`` for train.jsonl, train-00000-of-00002.parquet and train/x.jsonl."""
    parts = [part.lower() for part in file.parts]
    return parts[0] if len(parts) > 1 and parts[0] != "data" else parts[-1].split(".")[0].split("-0")[0]


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
