"""What is said while rows are encoded: how many there are so far, and how many in all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tt_data
from tt_data import load_dataset
from tt_data.encoding.progress import count_all
from tt_data.rows import counts
from tt_data.rows.sources import open_sources

ROWS = 1300


def lines(path: Path, number: int = ROWS) -> Path:
    path.write_text("".join(json.dumps({"text": f"row no {i}"}) + "\n" for i in range(number)))
    return path


class Heard:
    """A ``progress`` that remembers what it hears."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.total: float | None = None

    def __call__(self, read: int, count: Callable[[], float | None]) -> None:
        self.read.append(read)
        self.total = count()


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}], ids=["here", "a process"])
def test_every_batch_is_counted_and_the_rows_are_the_same(
    tmp_path: Path, chatml: tt_data.Tokenizer, workers: dict[str, Any]
) -> None:
    heard, path = Heard(), lines(tmp_path / "a.jsonl")
    rows, silent = load_dataset(path, chatml, progress=heard, **workers), load_dataset(path, chatml)
    assert heard.read == [512, 1024, ROWS]
    assert heard.total == ROWS
    assert [rows[i] for i in range(ROWS)] == [silent[i] for i in range(ROWS)]
    assert (rows.report, rows.fingerprint) == (silent.report, silent.fingerprint)


def test_the_rows_of_several_sources_are_counted_together(tmp_path: Path, chatml: tt_data.Tokenizer) -> None:
    heard = Heard()
    load_dataset([lines(tmp_path / "a.jsonl", 600), lines(tmp_path / "b.jsonl", 20)], chatml, progress=heard)
    assert (heard.read, heard.total) == ([512, 600, 620], 620)


def test_a_limit_and_a_sample_are_fewer_rows(tmp_path: Path, chatml: tt_data.Tokenizer) -> None:
    heard, path = Heard(), lines(tmp_path / "a.jsonl", 10_500)
    load_dataset(path, chatml, progress=heard, limit=100)
    assert (heard.read, heard.total) == ([100], 100)
    load_dataset(path, chatml, progress=heard, sample=True)
    assert (heard.read[-1], heard.total) == (4200, 4200)


def test_a_cached_data_set_is_not_encoded(tmp_path: Path, chatml: tt_data.Tokenizer) -> None:
    first, second, path = Heard(), Heard(), lines(tmp_path / "a.jsonl")
    for heard in (first, second):
        load_dataset(path, chatml, progress=heard, cache_dir=tmp_path / "cache")
    assert (first.total, second.read) == (ROWS, [])


def test_rows_in_memory_and_in_tables_have_a_number_and_a_document_has_none(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"]}), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    assert count_all(open_sources([{"text": "a"}] * 7)) == 7
    assert count_all(open_sources(str(tmp_path / "rows.parquet"))) == 3
    assert count_all(open_sources(str(tmp_path / "rows.json"))) is None
    assert count_all(open_sources([str(tmp_path / "rows.json"), str(tmp_path / "rows.parquet")]), limit=2) == 2


def test_the_rows_of_a_large_file_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = open_sources(str(lines(tmp_path / "a.jsonl", 20_000)))
    assert counts.quick_count(source, exact_bytes=1 << 30) == 20_000
    monkeypatch.setattr(counts, "_PIECE", 1 << 10)
    found = counts.quick_count(source, exact_bytes=0)
    assert isinstance(found, float)
    assert abs(found - 20_000) < 1000
