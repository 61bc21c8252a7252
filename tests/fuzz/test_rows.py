"""Files of rows, in every format: found, opened, read."""

import bz2
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others reserve a GiB that they do not use

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tt_data.rows.sources import open_sources
from tt_data.stream.raw import to_stream

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u00e9"}], "tools": "[]"},
    {"messages": [{"role": "user", "content": 'c, "d"'}, {"role": "assistant", "content": "e\n"}], "tools": None},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b'prompt,completion\na,"b ""c"", d"\n"e\nf",g\n'


def parquet(**options: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, **options)
    return out.getvalue()


def arrow(new: Any) -> bytes:
    out, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


SEEDS: dict[str, list[bytes]] = {
    "jsonl": [LINES, b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), json.dumps(ROWS, indent=1).encode()],
    "json": [json.dumps(ROWS).encode(), json.dumps({"data": ROWS}, indent=1).encode(), LINES],
    "csv": [CSV], "tsv": [CSV.replace(b",", b"\t")],
    "parquet": [parquet(), parquet(compression="zstd", use_dictionary=False, row_group_size=1)],
    "arrow": [arrow(pyarrow.ipc.new_file), arrow(pyarrow.ipc.new_stream)],
    "jsonl.gz": [gzip.compress(LINES)], "csv.bz2": [bz2.compress(CSV)], "jsonl.xz": [lzma.compress(LINES)],
    "jsonl.zst": [zstandard.ZstdCompressor().compress(LINES)],
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEDS)
def test_any_bytes_are_rows_or_one_of_our_errors(tmp_path: Path, fuzz: Any, kind: str) -> None:
    file = tmp_path / f"rows.{kind}"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for source in open_sources(str(file)):
            for _ in source.rows():
                pass

    fuzz(read, fuzz.mutated(*SEEDS[kind]))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_any_bytes_are_a_stream_or_one_of_our_errors(tmp_path: Path, fuzz: Any, kind: str) -> None:
    file = tmp_path / f"rows.{kind}"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for source in open_sources(str(file)):
            stream = to_stream(source)
            for start in (0, 1):
                for line, raw in stream.open_at(start):
                    stream.parse(line, raw)
            stream.count()

    fuzz(read, fuzz.mutated(*SEEDS[kind]))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_any_values_are_rows_or_one_of_our_errors(tmp_path: Path, fuzz: Any, kind: str) -> None:
    """Tables whose columns are what JSON holds, written as such files."""
    file = tmp_path / f"rows.{kind}"

    def read(rows: Any) -> None:
        try:
            table = pyarrow.Table.from_pylist(rows)
            if kind == "parquet":
                pyarrow.parquet.write_table(table, file)
            else:
                with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
                    writer.write_table(table)
        except Exception:  # not a table
            return
        for source in open_sources(str(file)):
            for _ in source.rows():
                pass

    fuzz(read, fuzz.mutated_json(ROWS))
