"""How many rows a source has, without reading them as rows."""

from __future__ import annotations

import os
from pathlib import Path

from tt_data.files import BOM
from tt_data.rows.data_files import KINDS
from tt_data.rows.json_files import DOCUMENT, file_kind, open_data
from tt_data.rows.sources import Source

_CHUNK = 1 << 20
_PIECES, _PIECE = 64, 1 << 16  # of a large file: their lines are counted


def quick_count(source: Source, *, exact_bytes: int) -> float | None:
    """The rows of ``source``, of lines the empty ones too; a float if it is an estimate, for more than ``exact_bytes``
    of lines. None if only reading the rows would tell."""
    path = source.path
    if path is None:
        return source.size
    if has_lines(path):
        is_small = path.stat().st_size <= max(exact_bytes, _PIECES * _PIECE)
        return count_lines(path) if is_small else estimate_lines(path)
    return count_parquet(path) if file_kind(path) == ".parquet" else None


def has_lines(path: Path) -> bool:
    """Whether each line is a row, in a file that is not compressed."""
    if file_kind(path) not in (".jsonl", ".ndjson") or path.suffix.lower() in KINDS:
        return False
    with open_data(path) as stream:
        return stream.readline(64).removeprefix(BOM).strip() not in DOCUMENT


def count_lines(path: Path) -> int:
    """The lines of a file, the empty ones too."""
    total, last = 0, b"\n"
    with open_data(path) as stream:
        while chunk := stream.read(_CHUNK):
            total += chunk.count(b"\n")
            last = chunk[-1:]
    return total + (last != b"\n")


def estimate_lines(path: Path) -> float:
    """About as many, from pieces at even distances."""
    found = 0
    with open_data(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        for i in range(_PIECES):
            stream.seek(i * (size - _PIECE) // (_PIECES - 1))
            found += stream.read(_PIECE).count(b"\n")
    return found / (_PIECES * _PIECE) * size


def count_parquet(path: Path) -> int:
    """The rows that the end of a parquet file names."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)
