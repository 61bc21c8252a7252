"""What becomes of input that is wrong: RELIABILITY's table of data, and more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_dataset

GOOD = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]}


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    (turns(("user", "a"), ("assistant", "")), "empty", "the assistant message 1 is empty"),
    (turns(("user", "a"), ("assistant", " \n")), "empty", "the assistant message 1 is empty"),
    (turns(("user", ""), ("assistant", "b")), "wrong roles", "the user message 0 is empty"),
    (turns(("user", None), ("assistant", "b")), "null", "the content of message 0 is null"),
    (turns(("user", "a"), ("assistant", None)), "null", "the content of message 1 is null"),
    (turns(("user", 5), ("assistant", "b")), "wrong type", "the content of message 0 is int, expected text"),
    (turns(("user", "a"), ("user", "b"), ("assistant", "c")), "wrong roles",
     "two user turns in a row at message 1 (roles: user, user, assistant)"),
    (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "wrong roles", "two assistant turns in a row"),
    (turns(("assistant", "a"), ("user", "b")), "wrong roles", "assistant before any user turn at message 0"),
    (turns(("user", "a"), ("assistant", "b"), ("user", "c")), "ends with user", "(roles: user, assistant, user)"),
    (turns(("user", "a"), ("system", "s"), ("assistant", "b")), "wrong roles", "system must come first"),
    (turns(("user", "a"), ("tool", "t"), ("assistant", "b")), "wrong roles", "a tool answer without an assistant turn"),
    (turns(("user", "a")), "wrong roles", "needs at least 2 messages, got 1"),
    (turns(("user", "a"), ("assitant", "b")), "unknown role", "unknown role 'assitant'"),
    (turns(("user", "a"), ("assitant", "b")), "unknown role", "did you mean 'assistant'"),
    (turns(("humman", "a"), ("assistant", "b")), "unknown role", "did you mean 'user'"),
    (turns((7, "a"), ("assistant", "b")), "unknown role", "unknown role 7"),
    ({"messages": []}, "empty", "the list of messages is empty"),
    ({"messages": None}, "null", "the list of messages is null"),
    ({"messages": "hello"}, "wrong type", "expected a list of messages, found str"),
    ({"messages": "[{"}, "wrong type", "messages is text but not JSON"),
    ({"messages": ["a", "b"]}, "wrong type", "the turns are texts without roles"),
    ({"messages": [{"content": "a"}, {"content": "b"}]}, "missing column", "message 0 has no role, only 'content'"),
    ({"messages": {"role": "user"}}, "wrong type", "expected a list of messages, found dict"),
    ({**GOOD, "tools": "[{"}, "wrong type", "tools is text but not JSON"),
    ({**GOOD, "chat_template_kwargs": "x"}, "wrong type", "chat_template_kwargs holds str, expected an object"),
    ({**GOOD, "tools": ["f"]}, "wrong type", "tools must be a list of JSON schemas"),
    ({"txt": "hello"}, "missing column", "no column 'messages', the row has 'txt'"),
    (turns(("user", "a\ud800"), ("assistant", "b")), "not text", "half of a surrogate pair in the text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "text"), BAD_ROWS)
def test_a_bad_row_is_counted_placed_and_dropped(
    chatml: Any, write_jsonl: Any, row: Any, reason: str, text: str
) -> None:
    path = write_jsonl([GOOD, row])
    dataset = load_dataset(path, chatml)
    assert len(dataset) == 1
    assert dataset.report["dropped"] == {reason: 1}
    (problem,) = dataset.report["problems"]
    assert problem.startswith(f"{path}:2: ")
    assert text in problem
    with pytest.raises(ValueError, match="on_bad_row is error") as refusal:
        load_dataset(path, chatml, on_bad_row="error")
    assert f"{path}:2: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


JUDGED = {"prompt": "a", "completion": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("good", "row", "text"),
    [
        ({"text": "a"}, {"text": ""}, "column 'text' is empty"),
        ({"text": "a"}, {"text": None}, "column 'text' is null"),
        ({"text": "a"}, {"text": ["a"]}, "column 'text' holds list, expected text"),
        ({"text": "a"}, {"txt": "b"}, "no column 'text', the row has 'txt'"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "no column 'completion', the row has 'prompt'"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}, "column 'completion' is empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, "column 'output' is null"),
        (PAIR, {"prompt": "a", "chosen": "b"}, "no column 'rejected', the row has 'prompt', 'chosen'"),
        (PAIR, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (PAIR, {"prompt": "a", "chosen": "b", "rejected": ""}, "column 'rejected' is empty"),
        (PAIR, {"prompt": "a", "chosen": None, "rejected": "b"}, "column 'chosen' is null"),
        (PAIR, {"chosen": "a ", "rejected": "a b"}, "the answer of chosen or of rejected is empty"),
        ({**JUDGED, "label": True}, {**JUDGED, "label": None}, "column 'label' is null"),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "input": ["x"], "output": "b"},
            "'input' holds list",
        ),
    ],
)
def test_a_bad_row_of_other_schemas(llama: Any, good: Any, row: Any, text: str) -> None:
    dataset = load_dataset([good, row], llama)
    assert len(dataset) == 1
    assert text in dataset.report["problems"][0]


def test_policies_have_names(chatml: Any) -> None:
    with pytest.raises(ValueError, match="on_bad_row must be drop or error, got 'skip'"):
        load_dataset([GOOD], chatml, on_bad_row="skip")
    with pytest.raises(ValueError, match="max_seq_len must be at least 2, got 1"):
        load_dataset([GOOD], chatml, max_seq_len=1)


def test_rows_without_a_trainable_token_are_counted(chatml: Any, make_chat_rows: Any) -> None:
    long = turns(("user", "the cat sat on a mat " * 20), ("assistant", "b"))
    dataset = load_dataset([GOOD, long], chatml, max_seq_len=30)
    assert dataset.report["dropped"] == {"no trainable token": 1}
    with pytest.raises(
        ValueError, match=r"5 of 5 rows have no trainable token at max_seq_len 4 \(longest prompt \d+\)"
    ):
        load_dataset(make_chat_rows(5), chatml, max_seq_len=4)


def test_only_bad_rows_are_an_error(chatml: Any) -> None:
    with pytest.raises(ValueError, match=r"rows: 2 of 2 rows are bad \(1 empty, 1 null\), none can be used: rows:0: "):
        load_dataset([{"text": ""}, {"text": None}], chatml)


FILES: list[tuple[str, bytes, str]] = [
    ("rows.jsonl", b"", "has 0 rows"),
    ("rows.jsonl", b"\n\n", "has 0 rows"),
    ("rows.json", b"[]", "has 0 rows"),
    ("rows.csv", b"text\n", "has 0 rows"),
    ("rows.jsonl", b'{"text": "a"}\n{"text": "b", }\n', r":2:1[35]: broken JSON \(.*\) near '{\"text\": \"b\", }"),
    ("rows.jsonl", b'{"text": "a"}\n{"text": "b"', "rows.jsonl:2:13: broken JSON"),
    ("rows.jsonl", b'{"text": "a"}\n[1]\n', "rows.jsonl:2: expected an object with columns, found list"),
    ("rows.jsonl", b'{"text": "a\xff"}\n', r"rows.jsonl:1:12: not UTF-8 \(byte 0xff\)"),
    ("rows.jsonl", b'{"a":' * 100000, "rows.jsonl:1: broken JSON"),
    ("rows.json", b'[{"text": "a"},\n {"text": }]', "rows.json:2:11: broken JSON"),
    ("rows.json", b'[{"text": "a"}, 5]', "row 2: expected an object with columns, found int"),
    ("rows.json", b'[{"text": "\xff"}]', "rows.json:1: not UTF-8"),
    ("rows.csv", b"text,b\na,b\nc\n", "rows.csv:3: 1 value, but the header has 2 columns"),
    ("rows.csv", b"text,b\na,b,c\n", "rows.csv:2: 3 values, but the header has 2 columns"),
    ("rows.csv", b"text\na\n\xff\n", "not UTF-8"),
    ("rows.parquet", b"PAR1 nonsense", "not a whole parquet file"),
    ("rows.arrow", b"nonsense", "not a whole arrow file"),
    ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer, not the file"),
    ("rows.txt", b"hello", "unknown kind of file, expected one of .arrow"),
    ("rows.jsonl", b'{"txt": "a"}\n', r"no known schema has .*\['txt'\].*did you mean columns={'text': 'txt'}"),
    ("rows.jsonl", b'{"a": 1}\n', r"expected one of \(pretokenized: input_ids; preference: chosen"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "text"), FILES)
def test_a_bad_file_names_its_place(chatml: Any, tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text) as refusal:
        load_dataset(tmp_path / name, chatml)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / name) in str(refusal.value)
    assert len(str(refusal.value)) < 1200


def test_broken_lines_are_found_behind_good_ones(chatml: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}"}) for i in range(2000)]
    lines[1500] = lines[1500][:-1]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"rows.jsonl:1501:20: broken JSON"):
        load_dataset(tmp_path / "rows.jsonl", chatml)


def test_a_missing_file_names_its_neighbours(chatml: Any, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl([GOOD], "train.jsonl")
    with pytest.raises(FileNotFoundError, match=rf"trian.jsonl: no such file \(looked in .*\); did you mean {path}"):
        load_dataset(tmp_path / "trian.jsonl", chatml)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_dataset(["./nowhere.jsonl"], chatml)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data file in this directory"):
        load_dataset(tmp_path / "empty", chatml)


def test_an_unknown_hub_id_says_that_neither_is_there(chatml: Any) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nobody/nothing: no such file here .* could not be loaded from the hub"
    ):
        load_dataset("nobody/nothing", chatml)


def test_a_source_of_another_type_is_refused(chatml: Any) -> None:
    with pytest.raises(ValueError, match="expected a path, a list of paths, a hub id or rows, got int"):
        load_dataset(5, chatml)
    with pytest.raises(ValueError, match="rows:1: expected an object with columns, found str"):
        load_dataset([{"text": "a"}, "b"], chatml)
    with pytest.raises(ValueError, match="an empty mix"):
        load_dataset({}, chatml)


def test_rows_of_two_kinds_are_not_mixed(llama: Any, write_jsonl: Any) -> None:
    files = [write_jsonl([{"text": "a"}], "a.jsonl"), write_jsonl([PAIR], "b.jsonl")]
    with pytest.raises(ValueError, match=r"b.jsonl:1: pair rows cannot be mixed with the single rows"):
        load_dataset(files, llama)
