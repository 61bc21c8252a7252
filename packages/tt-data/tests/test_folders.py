"""Files of a directory: compressed ones, those that are left out, and the parts of it that may be named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from tt_data import batches, load_dataset, summary_lines
from tt_data.rows import data_files
from tt_data.rows.folders import read_rows

ROWS = [{"text": f"row {i}"} for i in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as parallel compressors write them
    return bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst", ".GZ", ".Bz2", ".ZST"])
@pytest.mark.parametrize("kind", [".jsonl", ".JSON", ".csv"])
def test_compressed_files_are_read_whatever_the_case_of_their_name(tmp_path: Path, ending: str, kind: str) -> None:
    content = b"text\n" + b"".join(row["text"].encode() + b"\n" for row in ROWS) if kind == ".csv" else LINES
    path = tmp_path / f"rows{kind}{ending}"
    path.write_bytes((zstd if ending.lower() == ".zst" else PACK[ending.lower()])(content))
    assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_compressed_file_that_was_cut_or_is_none_is_named(
    chatml: Any, tmp_path: Path, ending: str, streaming: bool
) -> None:
    whole = (zstd if ending == ".zst" else PACK[ending])(LINES)
    for content in (whole[: len(whole) - 9], b"not compressed at all, but long enough for a header"):
        path = tmp_path / f"rows.jsonl{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"rows.jsonl{ending}: not a whole (gzip|bz2|xz|zstd) file \("):
            load_dataset(path, chatml, streaming=streaming).count_rows() if streaming else load_dataset(path, chatml)


def test_zstd_without_its_package_is_refused_with_the_cure(
    chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    (tmp_path / "part.jsonl").write_bytes(LINES)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr(data_files, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rows.jsonl.zst: compressed by zstd, .*pip install zstandard"):
        load_dataset(tmp_path, chatml)


@pytest.mark.parametrize("name", ["part-1.jsonl.lz4", "part-1.csv.zip", "part-1.parquet.gz"])
def test_rows_in_another_compression_are_not_skipped(chatml: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "part-0.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name}: compressed in a way that is not read; unpack it"):
        load_dataset(tmp_path, chatml)
    assert len(load_dataset(tmp_path, chatml, data_files="part-0.*")) == 30
    with pytest.raises(ValueError, match=f"{name}: unknown kind of file, .*; unpack it first"):
        load_dataset(tmp_path / name, chatml)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_directory_that_are_not_read_are_counted_and_named(
    chatml: Any, tmp_path: Path, streaming: bool
) -> None:
    for name in ("a.jsonl", "notes.txt", "README.md", "_b.jsonl", ".c.jsonl", "sub/d.jsonlines", ".git/e.jsonl", ".f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    report = load_dataset(tmp_path, chatml, streaming=streaming).report
    names = [".c.jsonl", "README.md", "_b.jsonl", "notes.txt", "sub/d.jsonlines"]
    assert report["files_left_out"] == [str(tmp_path / name) for name in names]
    (line,) = [line for line in summary_lines(report) if "not read" in line]
    assert line.startswith(f"5 files of the directory not read: {tmp_path}/.c.jsonl, ")
    assert load_dataset(tmp_path / "a.jsonl", chatml).report["files_left_out"] == []


def test_files_that_are_not_read_are_named_behind_the_cache_and_in_mixes(chatml: Any, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        (folder / "rows.jsonl").write_bytes(LINES)
    load_dataset(folders[0], chatml, cache_dir=tmp_path / "cache")
    (folders[0] / "x.txt").write_text("")
    assert load_dataset(folders[0], chatml, cache_dir=tmp_path / "cache").report["files_left_out"]
    mixed = load_dataset({str(folder): 1 for folder in folders}, chatml)
    assert mixed.report["files_left_out"] == [str(folders[0] / "x.txt")]
    assert "x.txt" in mixed.report["notes"][0]


def test_other_splits_are_named(chatml: Any, tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert load_dataset(tmp_path, chatml).report["files_left_out"] == [str(tmp_path / "test.jsonl")]


def test_a_directory_has_parts_as_a_data_set_of_the_hub_has(chatml: Any, tmp_path: Path) -> None:
    for name in ("data/rl/a.jsonl", "data/rl/b.jsonl", "data/reward/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    parts: list[tuple[dict[str, Any], list[str]]] = [
        ({"data_dir": "data/rl"}, ["a", "b"]), ({"data_dir": "data/rl", "data_files": "b.jsonl"}, ["b"]),
        ({"data_files": ["data/*/c.jsonl"]}, ["c"]), ({"data_dir": "data", "data_files": {"train": "reward/*"}}, ["c"]),
    ]  # fmt: skip
    for options, names in parts:
        for streaming in (False, True):
            dataset = load_dataset(tmp_path, chatml, streaming=streaming, **options)
            assert [Path(name).stem for name in dataset.names] == names
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data_files": "d.jsonl"}, "no file 'd.jsonl' in it"), ({"revision": "main"}, "only hub data sets have them"),
        ({"data_dir": "data/sft"}, "no such file"), ({"data_files": {"test": "x"}}, "no split 'train', expected one"),
    ]  # fmt: skip
    for options, text in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            load_dataset(tmp_path, chatml, **options)
    with pytest.raises(ValueError, match="data_dir: .*a.jsonl is a file, expected a directory or a hub id"):
        load_dataset(tmp_path / "data/rl/a.jsonl", chatml, data_dir="data/rl")
    with pytest.raises(ValueError, match="rows in memory have no such parts"):
        load_dataset(ROWS, chatml, data_dir="data/rl")


def test_json_with_data_files_is_these_files(chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    for files in ("mine.jsonl", ["mine.jsonl"], {"train": str(tmp_path / "mine.jsonl")}):
        assert len(load_dataset("json", chatml, data_files=files, split="train")) == 30


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(("value", "count"), [
    ({"messages": CHAT}, 1), ({"id": 5, "conversations": [{"from": "human", "value": "hello"},
                                                         {"from": "gpt", "value": "red"}]}, 1),
    (CHAT, 1), ([CHAT, [*CHAT, *CHAT]], 2), ([{"messages": CHAT}], 1), ({"data": [{"messages": CHAT}] * 2}, 2),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, 1), ({"prompt": "hello", "completion": CHAT[1:]}, 1),
])  # fmt: skip
def test_a_document_over_many_lines_is_understood(
    chatml: Any, tmp_path: Path, name: str, value: Any, count: int
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(value, indent=2))
    for streaming in (False, True):
        dataset = load_dataset(path, chatml, streaming=streaming, drop_duplicates=False)
        first = dataset.head() if streaming else dataset
        assert len(first) == count
        text = "".join(text for text, _ in first.rendered(0))
        assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"


def test_documents_one_behind_the_other_have_their_lines(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n\n".join(json.dumps({"text": f"row {i}"}, indent=2) for i in range(3)) + "\n")
    dataset = load_dataset(path, chatml)
    assert [dataset.where(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 5, 9)]
    path.write_text('{\n"text": "a"\n}\n{\n"text": \n}')
    with pytest.raises(ValueError, match=r"rows.json:6:1: broken JSON"):
        load_dataset(path, chatml)


def test_nan_is_null_in_files_and_in_memory(chatml: Any, tmp_path: Path) -> None:
    nan = float("nan")
    row = {"messages": [*CHAT[:1], {**CHAT[1], "reasoning_content": nan, "weight": nan}], "system": nan, "tools": nan}
    sources: list[Any] = [[row], tmp_path / "rows.jsonl", tmp_path / "rows.json"]
    for path in sources[1:]:
        path.write_text(json.dumps(row if path.suffix == ".jsonl" else [row]))
    for source in sources:
        dataset = load_dataset(source, chatml)
        assert dataset[0] == load_dataset([{"messages": CHAT}], chatml)[0]
        assert dataset.report["notes"] == []
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"instruction": ["a", "b"], "input": [nan, nan], "output": ["c", "d"], "score": [nan, 1.0]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    report = load_dataset(tmp_path / "rows.parquet", chatml).report
    assert (report["rows"], report["dropped"]) == (2, {})
    assert "'score' (1 row)" in report["notes"][0]
    (tmp_path / "rows.csv").write_text("instruction,input,output,system\na,NaN,c,nan\nb,,NaN,\n")
    for streaming in (False, True):
        dataset = load_dataset(tmp_path / "rows.csv", chatml, streaming=streaming)
        assert next(batches(dataset, batch_size=1))["input_ids"][0].tolist() == list(
            load_dataset([{"instruction": "a", "output": "c"}], chatml)[0]["input_ids"]
        )
    assert load_dataset(tmp_path / "rows.csv", chatml).report["dropped"] == {"null": 1}


def test_a_pattern_is_the_files_that_it_matches(chatml: Any, tmp_path: Path) -> None:
    for number, name in enumerate(("part-1.jsonl", "part-0.jsonl", "other.jsonl", "sub/part-2.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": f"{number}"}))
    for pattern, names in (("part-*.jsonl", ["part-0", "part-1"]), ("**/part-?.jsonl", ["part-0", "part-1", "part-2"])):
        for streaming in (False, True):
            dataset = load_dataset(str(tmp_path / pattern), chatml, streaming=streaming)
            assert [Path(name).stem for name in dataset.names] == names
    with pytest.raises(FileNotFoundError, match=r"x\*.jsonl: no file with this name"):
        load_dataset(tmp_path / "x*.jsonl", chatml)


def test_a_data_frame_is_its_rows(chatml: Any) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", None, "b"], "score": [1.0, float("nan"), float("nan")]})
    report = load_dataset(frame, chatml).report
    assert (report["rows"], report["dropped"]) == (2, {"null": 1})
    assert "'score' (1 row)" in report["notes"][0]
