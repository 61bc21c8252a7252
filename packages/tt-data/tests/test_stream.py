"""Streams: the rows of the file, shuffled within a buffer, entered anywhere."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tt_data import batches, load_dataset, steps_per_epoch
from tt_data.rows.sources import open_sources
from tt_data.stream.raw import to_stream


def texts(tokenizer: Any, batch: Any) -> list[str]:
    return [
        tokenizer.decode(ids)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        if max(labels) >= 0
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.suffix
    if kind == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        parquet.write_table(table, path, row_group_size=7)
    elif kind == ".csv":
        path.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"text": f"row {i}"} for i in range(40)]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_can_be_opened_in_the_middle(tmp_path: Path, kind: str) -> None:
    (source,) = open_sources(write(tmp_path / f"rows{kind}", ROWS))
    stream = to_stream(source)
    assert stream.count() == 40
    for start in (0, 1, 6, 7, 8, 39, 40, 99):
        found = [stream.parse(line, raw) for line, raw in stream.open_at(start)]
        assert found == ROWS[start:]


def test_lines_far_down_are_found_from_marks(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(10_000)])
    stream = to_stream(open_sources(path)[0])
    for start in (9000, 4096, 8192, 4095, 9999, 10_000, 1):
        first = next(stream.open_at(start), None)
        assert first == (None if start == 10_000 else (start + 1, b'{"text": "row %d"}\n' % start))
    assert sum(1 for _ in stream.open_at(0)) == 10_000


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_stream_and_a_map_hold_the_same_rows(chatml: Any, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows{kind}", ROWS)
    stream, whole = load_dataset(path, chatml, streaming=True, buffer=16), load_dataset(path, chatml)
    assert stream.count_rows() == len(whole) == 40
    assert stream.schema == whole.schema == "text"
    for epoch in range(3):
        steps = islice(batches(stream, batch_size=6, start_step=7 * epoch), steps_per_epoch(40, 6))
        assert sorted(text for batch in steps for text in texts(chatml, batch)) == sorted(row["text"] for row in ROWS)


def test_rows_move_within_the_buffer_only(chatml: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    stream = load_dataset(path, chatml, streaming=True, buffer=10)
    for block, batch in enumerate(islice(batches(stream, batch_size=10), 4)):
        assert sorted(texts(chatml, batch)) == sorted(f"row {i}" for i in range(10 * block, 10 * block + 10))
        assert texts(chatml, batch) != [f"row {i}" for i in range(10 * block, 10 * block + 10)]
    assert next(
        load_dataset(path, chatml, streaming=True, buffer=40).raw_row(0, 0, seed=0, shuffle=False)[1:2] for _ in "x"
    ) == (1,)


def test_bad_rows_make_a_step_shorter_and_are_counted(chatml: Any, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}" if i != 5 else ""} for i in range(12)]
    stream = load_dataset(write(tmp_path / "rows.jsonl", rows), chatml, streaming=True)
    sizes = [len(batch["input_ids"]) for batch in islice(batches(stream, batch_size=4, shuffle=False), 6)]
    assert sizes == [4, 3, 4, 4, 3, 4]
    assert stream.report["rows"] == 11
    assert stream.report["dropped"] == {"empty": 1}
    assert stream.report["problems"] == [f"{tmp_path / 'rows.jsonl'}:6: column 'text' is empty"]
    assert stream.report["streaming"]


def test_empty_lines_are_no_rows(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}')
    stream = load_dataset(path, chatml, streaming=True)
    assert sorted(texts(chatml, next(batches(stream, batch_size=3)))) == ["a", "b"]
    assert stream.report["dropped"] == {}


def test_several_files_are_one_stream(chatml: Any, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.jsonl", ROWS[:13]),
        write(tmp_path / "b.csv", ROWS[13:20]),
        write(tmp_path / "c.jsonl", ROWS[20:]),
    ]
    stream = load_dataset(paths, chatml, streaming=True, buffer=8)
    ordered = [
        text for batch in islice(batches(stream, batch_size=5, shuffle=False), 8) for text in texts(chatml, batch)
    ]
    assert ordered == [row["text"] for row in ROWS]
    for start in range(8):
        resumed = load_dataset(paths, chatml, streaming=True, buffer=8)
        assert (
            texts(chatml, next(batches(resumed, batch_size=5, shuffle=False, start_step=start)))
            == ordered[5 * start : 5 * start + 5]
        )


def test_a_stream_reads_no_further_than_it_must(chatml: Any, tmp_path: Path) -> None:
    """Rows behind the first block may be broken: they are met when they are needed."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    stream = batches(load_dataset(path, chatml, streaming=True, buffer=8), batch_size=8)
    assert len(list(islice(stream, 5))) == 5
    with pytest.raises(ValueError, match=r"rows.jsonl:41:2: broken JSON"):
        next(stream)


def test_memory_holds_two_blocks(chatml: Any, tmp_path: Path) -> None:
    stream = load_dataset(write(tmp_path / "rows.jsonl", ROWS), chatml, streaming=True, buffer=4)
    for _ in islice(batches(stream, batch_size=4), 25):
        assert len(stream.blocks[0]._kept) <= 2


def test_streams_can_be_looked_at(chatml: Any, tmp_path: Path) -> None:
    stream = load_dataset(write(tmp_path / "rows.jsonl", ROWS), chatml, streaming=True)
    assert stream.rendered(3) == [("row 3<|im_end|>", True)]
    assert len(stream.head(5)) == 5
    packed = load_dataset(tmp_path / "rows.jsonl", chatml, streaming=True, packing=True, max_seq_len=32)
    assert packed.rendered(0) == [("row 0<|im_end|>", True)]


def test_the_fingerprint_follows_file_and_settings(chatml: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    base = load_dataset(path, chatml, streaming=True).fingerprint
    assert load_dataset(path, chatml, streaming=True).fingerprint == base
    assert load_dataset(path, chatml, streaming=True, buffer=7).fingerprint != base
    assert load_dataset(path, chatml, streaming=True, train_on="last").fingerprint != base
    write(path, ROWS[:30])
    assert load_dataset(path, chatml, streaming=True).fingerprint != base


def test_packs_of_a_stream_are_counted_once_and_remembered(chatml: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    options: dict[str, Any] = {"streaming": True, "packing": True, "max_seq_len": 32, "buffer": 8}
    first = load_dataset(path, chatml, cache_dir=tmp_path / "cache", **options)
    list(islice(batches(first, batch_size=2), 12))
    assert first.complete
    again = load_dataset(path, chatml, cache_dir=tmp_path / "cache", **options)
    assert (again.counts, again.complete) == (first.counts, True)
    again.locate(10, 2, seed=0)
    assert again.rows.tally.seen == 0  # nothing had to be encoded to know where step 10 is
    (index,) = (tmp_path / "cache").iterdir()
    index.write_text("{broken")
    assert load_dataset(path, chatml, cache_dir=tmp_path / "cache", **options).counts == []


def test_rows_of_two_kinds_are_not_streamed_together(llama: Any, tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, row in zip(files, ({"text": "a"}, {"prompt": "a", "chosen": "b", "rejected": "c"}), strict=True):
        path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="cannot be mixed"):
        next(batches(load_dataset(files, llama, streaming=True), batch_size=2))


def test_what_a_stream_cannot_do_is_refused(chatml: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="buffer must be positive, got 0"):
        load_dataset(path, chatml, streaming=True, buffer=0)
    with pytest.raises(ValueError, match="has 0 rows"):
        load_dataset(write(tmp_path / "blank.jsonl", []), chatml, streaming=True)


def test_packs_of_a_stream_tell_how_full_they_are(chatml: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    options: dict[str, Any] = {"packing": True, "max_seq_len": 32}
    stream = load_dataset(path, chatml, streaming=True, buffer=40, **options)
    assert "efficiency" not in stream.report
    next(batches(stream, batch_size=2))
    assert stream.report["efficiency"] == load_dataset(path, chatml, **options).report["efficiency"]
    helped = load_dataset(path, chatml, streaming=True, buffer=40, **options)
    next(batches(helped, batch_size=2, num_workers=1))
    assert helped.report == stream.report


def test_an_index_that_cannot_be_written_is_a_warning(
    chatml: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    stream = load_dataset(
        write(tmp_path / "rows.jsonl", ROWS), chatml, streaming=True, packing=True, max_seq_len=32, buffer=8,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert len(list(islice(batches(stream, batch_size=2), 9))) == 9
    assert caplog.text.count("the index of packs was not written") == 1


@pytest.mark.parametrize(
    "content", ["[]", '{"counts": 5}', '{"counts": [-1], "tokens": [3]}', "null", '{"counts": ["a"]}']
)
def test_an_index_of_another_make_is_written_again(chatml: Any, tmp_path: Path, content: str) -> None:
    path, cache = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    options: dict[str, Any] = {"streaming": True, "packing": True, "max_seq_len": 32, "buffer": 8, "cache_dir": cache}
    whole = [texts(chatml, batch) for batch in islice(batches(load_dataset(path, chatml, **options), batch_size=2), 9)]
    (index,) = cache.iterdir()
    facts = json.loads(index.read_text())
    index.write_text(json.dumps({**facts, **json.loads(content)}) if content.startswith("{") else content)
    again = load_dataset(path, chatml, **options)
    assert [texts(chatml, batch) for batch in islice(batches(again, batch_size=2), 9)] == whole


def test_a_packed_mix_of_streams_holds_the_shares_of_packs(chatml: Any, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(60)]) for n in ("a", "b")]
    mix = load_dataset(
        {files[0]: 0.75, files[1]: 0.25}, chatml, streaming=True, packing=True, max_seq_len=16, buffer=20
    )
    found = [text for batch in islice(batches(mix, batch_size=4), 3) for text in texts(chatml, batch)]
    assert [text[0] for text in found].count("a") == 9
    assert {text[0] for text in found} == {"a", "b"}
    assert mix.report["packs"] == sum(part.num_packs for part in mix.parts)
    assert mix.report["form"] == "text"
    assert 0 < mix.report["efficiency"] <= 1
    assert mix.rendered(0) == [("a 0<|im_end|>", True)]
    assert len(mix.head(5)) == 5
    few = load_dataset({files[0]: 0.001, files[1]: 0.999}, chatml, streaming=True, packing=True, max_seq_len=16)
    with pytest.raises(ValueError, match="no whole round of packs; round the weights"):
        next(batches(few, batch_size=4))


def test_an_error_in_a_worker_names_the_row_of_a_stream(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    for options in ({}, {"packing": True, "max_seq_len": 16}):
        stream = load_dataset(path, chatml, streaming=True, buffer=8, **options)
        with pytest.raises(ValueError, match=rf"of batch \d+ of the stream of {path}: {path}:41:2: broken JSON"):
            list(islice(batches(stream, batch_size=4, num_workers=2), 40))


def rows_in_files(tmp_path: Path) -> list[Any]:
    """The same rows in every kind of source that can be streamed."""
    csv = tmp_path / "rows.csv"
    csv.write_text("prompt,completion\n" + "".join(f"the {i} ,cat\n" for i in range(40)))
    found: list[Any] = [[{"prompt": f"the {i} ", "completion": "cat"} for i in range(40)], csv]
    for name, write in (("rows.jsonl", _lines), ("rows.json", json.dumps), ("rows.jsonl.gz", _lines)):
        data = write(found[0]).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        found.append(tmp_path / name)
    return found


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("template", [None, "alpaca"])
def test_a_stream_can_be_sent_to_a_spawned_process(chatml: Any, tmp_path: Path, template: str | None) -> None:
    for source in rows_in_files(tmp_path):
        columns = {"instruction": "prompt"} if template else {}
        stream = load_dataset(source, chatml, streaming=True, buffer=8, template=template, columns=columns)
        expected = [next(batches(stream, batch_size=4, start_step=step))["input_ids"].tolist() for step in range(12)]
        sent = pickle.loads(pickle.dumps(stream))
        assert [next(batches(sent, batch_size=4, start_step=s))["input_ids"].tolist() for s in range(12)] == expected
    step = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 0, "shuffle": True}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(stream.rows_of_step, 3, **step).result(timeout=120) == stream.rows_of_step(3, **step)
