"""Rows of tables: csv, parquet, arrow."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tt_data.files import stand_in
from tt_data.rows.data_files import check_columns, data_error
from tt_data.rows.json_files import MAX_LINE, Placed, open_data
from tt_data.wording import counted, said, visible

_BATCH = 256  # rows that are made at once
_MAX_CONTAINER = 50_000  # elements of a list in the footer of a parquet file
_MAX_UNPACKED, _MAX_RATIO = 256 << 20, 500  # bytes of a row group, if they are more than that many times those on disk


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Placed]:
    """A header line, then a row per record; every value is text, but NaN, as pandas may write it, is null."""
    with open_data(path) as binary:
        if found := stand_in(binary.read(1024), text=True):
            raise data_error(path, None, found)
    with open_data(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(MAX_LINE)
        reader = csv.DictReader(_lines(path, stream), delimiter=delimiter, strict=True)  # an open quote must not
        start = 2  # swallow the rest
        try:
            names = reader.fieldnames or ()
            check_columns(path, 1, len(names))
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise data_error(path, 1, f"two columns are called {visible(twice[0], 60)!r}; rename one")
            _refuse_separator(path, names, delimiter)
            for row in reader:
                if None in row or None in row.values():
                    count = len(row.get(None, ())) + sum(v is not None for k, v in row.items() if k is not None)
                    found = f"{counted(count, 'value')}, but the header has {counted(len(names), 'column')}"
                    raise data_error(path, start, f"{found}; {_QUOTE}")
                yield start, {name: None if value in ("NaN", "nan") else value for name, value in row.items()}
                start = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise data_error(path, start, f"not UTF-8 ({error.reason}); save it as UTF-8") from None
        except csv.Error as error:
            raise data_error(path, start, f"broken csv ({error}); {_QUOTE}") from None


_QUOTE = "a value with a comma, a quote or a line end must be in quotes"


def _lines(path: Path, stream: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise data_error(path, number, f"a line of more than {MAX_LINE:,} characters, expected rows")
        if "\0" in line:
            raise data_error(path, number, "NUL characters; this is not csv in UTF-8, save it as that")
        yield line


def _refuse_separator(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Raise ValueError for a single column whose name contains a different separator."""
    others = [mark for mark in (";", "\t", ",", "|") if mark != delimiter and len(names) == 1 and mark in names[0]]
    if others:
        cure = {"\t": "call it .tsv", ",": "call it .csv"}.get(others[0], "save it with commas")
        called = repr(visible(names[0], 100))
        raise data_error(
            path, 1, f"one column called {called}: its separator is {others[0]!r}, expected {delimiter!r}; {cure}"
        )


def read_parquet(path: Path, start: int = 0) -> Iterator[Placed]:
    """Record batches, one at a time, from row ``start``; row groups before it are not read."""
    import pyarrow.parquet

    try:
        limits = {"thrift_container_size_limit": _MAX_CONTAINER}
        with pyarrow.parquet.ParquetFile(path, **limits) as file:
            check_columns(path, None, len(file.schema_arrow.names))
            number = 0
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                if number + facts.num_rows <= start:
                    number += facts.num_rows
                    continue
                _refuse_bomb(path, facts.total_byte_size)
                for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        if number > start:
                            yield number, without_nulls(row)
    except Exception as error:
        raise _not_whole(path, "parquet", error) from None


def _refuse_bomb(path: Path, unpacked: int) -> None:
    if unpacked > max(_MAX_UNPACKED, _MAX_RATIO * path.stat().st_size):
        raise data_error(path, None, f"rows of {unpacked:,} bytes in a file of {path.stat().st_size:,}; write it again")


def read_arrow(path: Path) -> Iterator[Placed]:
    """An Arrow file or stream, as ``datasets`` writes them."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                stream = pyarrow.ipc.open_stream(source)
                schema, batches = stream.schema, iter(stream)
            check_columns(path, None, len(schema.names))
            number = 0
            for batch in batches:
                batch.validate(full=True)  # offsets and indices that lead out of their buffers
                for first in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(first, _BATCH).to_pylist():
                        number += 1
                        yield number, without_nulls(row)
    except Exception as error:
        raise _not_whole(path, "arrow", error) from None


def _not_whole(path: Path, kind: str, error: Exception) -> Exception:
    """The error for a file that the reader of its kind refuses: whatever it raises, it is the file's fault."""
    if type(error) is ValueError and str(error).startswith(f"{visible(str(path))}: "):
        return error
    return data_error(path, None, f"not a whole {kind} file ({said(error)}); write or download it again")


# ---- missing values ----------------------------------------------------------------------------------------------


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a columnar file, whose objects all have the same keys, as it was before: a key that an object below the
    columns has no value for was not there (an argument that only another tool takes). NaN is null."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else null_for_nan(value)


def null_for_nan(value: Any) -> Any:
    """``value`` with None for every NaN in it, which is how pandas writes what is missing."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    return [null_for_nan(item) for item in value] if isinstance(value, list) else value
