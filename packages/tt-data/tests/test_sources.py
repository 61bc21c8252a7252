"""Files in every form that people have them in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_dataset
from tt_data.rows.folders import READERS, local_files, read_rows

ROWS = [{"text": f"row {i}", "n": i} for i in range(30)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_jsonl_in_its_variants(tmp_path: Path, newline: str, mark: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((mark + newline.join(json.dumps(row) for row in ROWS[:3]) + newline + newline).encode())
    assert list(read_rows(path)) == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2])]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as stream:
        stream.write(path.read_bytes())
    assert list(read_rows(tmp_path / "rows.jsonl.gz")) == list(read_rows(path))


def test_line_separators_inside_of_text_are_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_rows(path)) == [(1, {"text": "a\u2028b\x85c"})]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_json_lists_and_objects_that_hold_one(tmp_path: Path, indent: Any, wrap: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(wrap(ROWS), indent=indent))
    assert [row for _, row in read_rows(path)] == ROWS


def test_jsonl_that_is_called_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert [row for _, row in read_rows(path)] == ROWS
    path.write_text(json.dumps(ROWS[0]))
    assert [row for _, row in read_rows(path)] == ROWS[:1]


def test_csv_with_quotes_and_lines_inside(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,completion\n"a, ""b""","c\nd"\ne,f\n', encoding="utf-8")
    assert list(read_rows(path)) == [
        (2, {"prompt": 'a, "b"', "completion": "c\nd"}), (4, {"prompt": "e", "completion": "f"}),
    ]  # fmt: skip
    path = tmp_path / "rows.tsv"
    path.write_text("prompt\tcompletion\na\tb\n")
    assert list(read_rows(path)) == [(2, {"prompt": "a", "completion": "b"})]


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    for name, opened in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        assert [row for _, row in read_rows(tmp_path / name)] == ROWS
        assert [number for number, _ in read_rows(tmp_path / name)] == list(range(1, 31))


def test_data_sets_that_the_datasets_library_saved(tmp_path: Path, llama: Any) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([0, 1])}).save_to_disk(tmp_path / "both")
    assert len(load_dataset(tmp_path / "saved", llama)) == 30
    assert len(load_dataset(tmp_path / "both", llama)) == 30
    assert len(load_dataset(tmp_path / "both", llama, split="test")) == 2
    assert len(load_dataset(saved, llama)) == 30


def test_directories_and_their_splits(tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
        "test.jsonl",
        ".hidden.jsonl",
        "README.md",
    ):
        (tmp_path / name).write_text("{}")
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "x.csv").write_text("a")
    names = [path.name for path in local_files(tmp_path, None)]
    assert names == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [path.name for path in local_files(tmp_path, "test")] == ["test.jsonl"]
    assert [path.name for path in local_files(tmp_path, "validation")] == ["x.csv"]
    with pytest.raises(
        ValueError, match=r"no split 'trian', expected one of \['test', 'train', 'validation'\]; did you mean 'train'"
    ):
        local_files(tmp_path, "trian")


def test_a_directory_without_splits_is_all_of_its_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in local_files(tmp_path, None)] == ["a.jsonl", "b.csv"]


def test_every_kind_has_a_reader_that_refuses_noise(tmp_path: Path) -> None:
    noise = bytes(range(256)) * 20
    for suffix in READERS:
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(noise)
        with pytest.raises(ValueError, match=f"noise{suffix}"):
            list(read_rows(path))


def test_rows_of_several_files_keep_their_order(llama: Any, write_jsonl: Any) -> None:
    paths = [write_jsonl(ROWS[:2], "b.jsonl"), write_jsonl(ROWS[2:4], "a.jsonl")]
    dataset = load_dataset(paths, llama)
    assert [llama.decode(dataset[i]["input_ids"]) for i in range(4)] == [f"row {i}" for i in range(4)]
