"""Files that are not what their name says, and rows that other readers take at their word."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tt_data import batches, load_dataset

GOOD = '{"text": "good"}\n'
U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [U, A]}
GZIP = gzip.compress(GOOD.encode() * 100)

FILES: list[tuple[str, bytes, str]] = [
    ("rows.jsonl", GOOD.encode("utf-16"), "this is UTF-16 text, expected UTF-8; save it as UTF-8"),
    ("rows.jsonl", GOOD.encode("utf-16-le"), "; correct it"),
    ("rows.csv", "text\na\n".encode("utf-16"), "this is UTF-16 text, expected UTF-8; save it as UTF-8"),
    ("rows.jsonl", GZIP, "this is compressed by gzip; add .gz to its name"),
    ("rows.json", GZIP, "this is compressed by gzip; add .gz to its name"),
    ("rows.csv", GZIP, "this is compressed by gzip; add .gz to its name"),
    ("rows.jsonl.gz", GOOD.encode(), "not a whole gzip file (Not a gzipped file"),
    ("rows.jsonl.gz", GZIP[:-9], "end-of-stream marker was reached); compress or download it again"),
    ("rows.jsonl.gz", GZIP[:12] + b"\xff\xff" + GZIP[14:], "not a whole gzip file (Error -3"),
    ("rows.jsonl", b"PK\x03\x04", "this is a zip archive, not rows; unpack it"),
    ("rows.jsonl", b"PAR1", "this is a parquet file; call it .parquet"),
    ("rows.jsonl", b'{"text": "a", "text": "b"}\n', ":1: broken JSON (the key 'text' appears twice)"),
    ("rows.json", b'[{"text": "a", "text": "b"}]', "broken JSON (the key 'text' appears twice)"),
    ("rows.jsonl", GOOD.encode() + b'{"text": ' + b"9" * 5000 + b"}\n", ":2: broken JSON (Exceeds the limit"),
    ("rows.jsonl", GOOD.encode() + b"[" * 200_000, ":2: broken JSON (lists and objects more than 100 deep"),
    ("rows.jsonl", GOOD.replace("\n", "\r").encode() * 2, "; write a row per line"),
    ("rows.csv", b'prompt,completion\na,"b\nc,d\ne,f\n', ":2: broken csv (unexpected end of data)"),
    ("rows.csv", b'text\n"a"b\n', ":2: broken csv"),
    ("rows.csv", b"prompt;completion\na;b\n", ":1: one column called 'prompt;completion': its separator is ';', exp"),
    ("rows.csv", b"prompt\tcompletion\na\tb\n", "its separator is '\\t', expected ','; call it .tsv"),
    ("rows.tsv", b"prompt,completion\na,b\n", "its separator is ',', expected '\\t'; call it .csv"),
    ("rows.csv", b"text,text\na,b\n", ":1: two columns are called 'text'"),
    ("rows.csv", b"text,b\na,b\nc\n", ":3: 1 value, but the header has 2 columns"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "text"), FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_something_else_is_named(
    chatml: Any, tmp_path: Path, name: str, content: bytes, text: str, streaming: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.") as refusal:
        next(batches(load_dataset(path, chatml, streaming=streaming), batch_size=2))
    assert str(refusal.value).startswith(str(path))
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


def parquet(path: Path, rows: dict[str, Any]) -> Path:
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files.write_table(pyarrow.table(rows), path)
    return path


def test_a_cut_parquet_file_is_named(chatml: Any, tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", {"text": ["a", "b"]})
    path.write_bytes(path.read_bytes()[:-9])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"rows.parquet: not a whole parquet file \(Parquet magic bytes"):
            load_dataset(path, chatml, streaming=streaming)


def test_parquet_text_that_is_not_utf8_is_an_error_of_the_file(chatml: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    text = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(ValueError, match=r"rows.parquet: not a whole parquet file \('utf-8' codec"):
        load_dataset(parquet(tmp_path / "rows.parquet", {"text": text}), chatml)


ROWS: list[tuple[Any, Any, str, str]] = [
    ({"text": "a"}, {"text": float("nan")}, "null", "column 'text' is null"),
    ({"text": "a"}, {"text": float("inf")}, "null", "column 'text' is inf"),
    ({"text": "a"}, {"text": 10**4100}, "wrong type", "column 'text' holds int, expected text"),
    (CHAT, {"messages": [None, A]}, "wrong type", "message 0 is NoneType"),
    (CHAT, {"messages": [U, {"role": None, "content": "b"}]}, "missing column", "message 1 has no role"),
    (CHAT, {"messages": [{"role": "user", "content": [None]}, A]}, "not text", "a part of type 'NoneType'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "not text", "only text is supported"),
    (CHAT, {"messages": [U, {**A, "tool_calls": [None]}]}, "wrong type", "tool_calls of message 1 are not a list of"),
    (CHAT, {"messages": [U, {**A, "tool_calls": [{"function": None}]}]}, "wrong type", "has no function with a name"),
    (CHAT, {"messages": [U, {**A, "tool_calls": [{"id": "x"}]}]}, "wrong type", "message 1 has no function with a na"),
    (CHAT, {"messages": [U, {**A, "weight": -1}]}, "wrong weight", "message 1 has weight -1, expected 0 or 1"),
    (CHAT, {"messages": [U, {**A, "weight": "0"}]}, "wrong weight", "message 1 has weight '0', expected 0 or 1"),
    (CHAT, {"messages": [U, {**A, "weight": 0}]}, "no trainable token", "no trainable token"),
    (CHAT, {"text": "x"}, "missing column", "no column 'messages', the row has 'text'"),
    ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": 5}, "wrong type", "column 'labels' is not a"),
    ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [None, 2]}, "wrong type", "column 'labels' is not a"),
    ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "completion_mask": 1}, "wrong type", "column 'completion_mask'"),
    (
        {"prompt": "a ", "completion": "b", "label": True}, {"prompt": "a ", "completion": "b", "label": "no"},
        "wrong label", "column 'label' holds 'no', expected true or false",
    ),
    (
        {"prompt": "a ", "completion": "b", "label": True}, {"prompt": "a ", "completion": "b", "label": 3},
        "wrong label", "column 'label' holds '3', expected true or false",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "reason", "text"), ROWS)
def test_an_odd_row_is_counted_placed_and_dropped(chatml: Any, good: Any, bad: Any, reason: str, text: str) -> None:
    dataset = load_dataset([good, bad], chatml)
    assert (len(dataset), dataset.report["dropped"]) == (1, {reason: 1})
    (problem,) = dataset.report["problems"]
    assert problem.startswith("rows:1: ")
    assert text in problem


def test_labels_are_read_as_they_are_written(chatml: Any, tmp_path: Path) -> None:
    """In a csv all is text, and pandas writes 1.0: neither ``"false"`` nor ``"0"`` is true."""
    labels = {"True": True, "false": False, "1": True, "0": False}
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\n" + "".join(f"a,{n},{name}\n" for n, name in enumerate(labels)))
    dataset = load_dataset(path, chatml)
    assert dataset.schema == "unpaired_preference"
    assert [row["desirable"] for row in dataset] == list(labels.values())
    rows = [{"prompt": "a ", "completion": f"{n}", "label": label} for n, label in enumerate([1.0, 0.0, "false"])]
    assert [row["desirable"] for row in load_dataset(rows, chatml)] == [True, False, False]


def test_one_answer_judged_both_ways_is_no_duplicate(chatml: Any) -> None:
    rows = [{"prompt": "a ", "completion": "b", "label": label} for label in (True, False, True)]
    dataset = load_dataset(rows, chatml)
    assert [row["desirable"] for row in dataset] == [True, False]


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_judged_answers_keep_their_own_judgement(chatml: Any, streaming: bool) -> None:
    rows = [{"prompt": "a ", "completion": f"{n} {n}", "label": n % 3 == 0} for n in range(9)]
    dataset = load_dataset(rows, chatml, packing=True, max_seq_len=16, streaming=streaming)
    batch = next(batches(dataset, batch_size=9, shuffle=False))
    found = {}
    for answer, desirable in enumerate(batch["desirable"].tolist()):
        trained = (batch["answer_ids"] == answer) & (batch["labels"] != -100)
        found[chatml.decode(batch["labels"][trained].tolist()).strip()] = desirable
    assert found == {f"{n} {n}": n % 3 == 0 for n in range(9)}


TOOLS = {
    "messages": [
        [U, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {key: 1}}}]},
         {"role": "tool", "content": "1"}, A]
        for key in ("q", "z")
    ]
}  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "arrow", "datasets"])
@pytest.mark.parametrize("streaming", [False, True])
def test_arguments_of_other_calls_do_not_become_null(chatml: Any, tmp_path: Path, form: str, streaming: bool) -> None:
    """Columnar files give every object the keys of all others; transformers' templates would write them as null."""
    pyarrow = pytest.importorskip("pyarrow")
    source: Any = tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet(source, TOOLS)
    elif form == "arrow":
        table = pyarrow.table(TOOLS)
        with pyarrow.OSFile(str(source), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        source = pytest.importorskip("datasets").Dataset.from_dict(TOOLS)
    template = "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}<|im_end|>{% endfor %}"
    tokenizer = chatml.with_template({"default": template}, "calls")
    dataset = load_dataset(source, tokenizer, streaming=streaming)
    first = dataset.head() if streaming else dataset
    calls = ["".join(text for text, _ in first.rendered(i)).split("<|im_end|>")[1] for i in (0, 1)]
    assert [json.loads(call)[0]["function"]["arguments"] for call in calls] == [{"q": 1}, {"z": 1}]


def test_what_the_template_has_no_words_for_is_told(chatml: Any) -> None:
    call = {**A, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [{"messages": [U, call], "tools": [{"name": "f"}]}]
    assert load_dataset(rows, chatml).report["notes"] == [
        "the chat template does not write tool_calls (1 row, the first at rows:0)",
        "the chat template does not write tools (functions) (1 row, the first at rows:0)",
    ]
    assert load_dataset([CHAT], chatml).report["notes"] == []
    writes = chatml.with_template(
        {"default": "{{ tools }}{% for m in messages %}{{ m.tool_calls }}{{ m.content }}<|im_end|>{% endfor %}"}, "t"
    )
    assert load_dataset(rows, writes, train_on="all").report["notes"] == []


def test_a_line_of_ten_megabytes_is_a_row(chatml: Any, write_jsonl: Any) -> None:
    long = "cat " * 2_600_000
    dataset = load_dataset(write_jsonl([{"text": "a"}, {"text": long}]), chatml, max_seq_len=64)
    assert [dataset.length(i) for i in (0, 1)] == [2, 64]
    chat = load_dataset(write_jsonl([CHAT, {"messages": [U, {**A, "content": long}]}]), chatml, max_seq_len=64)
    assert chat.report["dropped"] == {"template": 1}
    assert "wrote more than 8000000 characters" in chat.report["problems"][0]


def test_a_directory_may_hold_many_kinds(chatml: Any, tmp_path: Path) -> None:
    for name, text in {
        "a.jsonl": GOOD, "b.csv": "text\nx\n", "sub/c.json": '[{"text": "deep"}]', "notes.txt": "no rows",
        ".git/d.jsonl": "{", ".cache/e/f.json": "{", "dataset_infos.json": "{}", "_g.jsonl": "{",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    dataset = load_dataset(tmp_path, chatml)
    assert [chatml.decode(row["input_ids"]) for row in dataset] == ["good", "x", "deep"]


def test_a_directory_does_not_lead_out_of_itself(chatml: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(GOOD)
    (tmp_path / "rows").mkdir()
    link = tmp_path / "rows" / "x.jsonl"
    link.symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl: a link out of its folder, to .*secret.jsonl; copy "):
        load_dataset(tmp_path / "rows", chatml)
    assert len(load_dataset(link, chatml)) == 1  # named by the user
    cache = tmp_path / "hub" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "123").write_text(GOOD)
    (cache / "rows.jsonl").symlink_to("../../blobs/123")
    assert len(load_dataset(cache, chatml)) == 1
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl: a link to .*nowhere, which is not there"):
        load_dataset(tmp_path / "gone.jsonl", chatml)


def test_mixed_data_sets_are_of_one_kind(chatml: Any, write_jsonl: Any) -> None:
    files = {
        write_jsonl([{"text": f"{i}"} for i in range(4)], "a.jsonl"): 1,
        write_jsonl([{"prompt": "a ", "chosen": f"{i}", "rejected": "c"} for i in range(4)], "b.jsonl"): 1,
    }
    packed: dict[str, Any] = {"packing": True, "max_seq_len": 16}
    for options in ({}, packed):
        with pytest.raises(ValueError, match="b.jsonl: preference rows cannot be mixed with text rows"):
            load_dataset(files, chatml, **options)
        with pytest.raises(ValueError, match="cannot be mixed"):
            next(batches(load_dataset(files, chatml, streaming=True, **options), batch_size=8))


FOREIGN = [
    (
        {"id": 1, "query": "sum 1 and 2", "tools": "[]", "answers": "[]"},
        "rows of function calls (xLAM's): write each as",
    ),
    (
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [A]},
        "OpenAI's preference rows: write",
    ),
    (
        {"conversations": ["a question", "an answer"], "source": "x"},
        "texts without roles (as in LIMA's rows); write each as",
    ),
]


@pytest.mark.parametrize(("row", "told"), FOREIGN)
def test_rows_of_other_projects_are_named_with_what_to_write(chatml: Any, row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_dataset([row], chatml)
    assert "did you mean" not in str(caught.value)
