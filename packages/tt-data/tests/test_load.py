"""Rows of every schema to ids and labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tt_data import TokenDataset, Tokenizer, load_dataset
from tt_data.token_rows.dataset import IGNORE_INDEX

USER, ANSWER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"


def trained(dataset: Any, i: int = 0) -> list[str]:
    return [text for text, flag in dataset.rendered(i) if flag]


def whole(dataset: Any, i: int = 0) -> str:
    return "".join(text for text, _ in dataset.rendered(i))


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "hello", "input": "", "output": "the cat"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "the cat"}]},
    "openai": {"messages": CHAT},
    "prompt_completion": {"prompt": "hello ", "completion": "the cat"},
    "text": {"text": "hello the cat"},
    "preference": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "a mat"}]},
    "unpaired_preference": {"prompt": CHAT[:1], "completion": CHAT[1:], "label": True},
    "pretokenized": {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
}


@pytest.mark.parametrize("name", ROWS)
def test_the_schema_is_detected_and_reported(chatml: Any, name: str) -> None:
    dataset = load_dataset([ROWS[name]], chatml)
    notes = dataset.report["notes"]
    assert len(notes) == (name == "prompt_completion")  # that no chat template is used
    assert dataset.report == {
        "schema": name, "rows": 1, "dropped": {}, "truncated": 0, "problems": [], "notes": notes,
        "files_left_out": [],
        "no_end_token": 1 if name == "pretokenized" else 0,
        "form": "text" if name in ("prompt_completion", "text", "pretokenized") else "chat",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "openai"])
def test_conversations_are_rendered_by_the_models_template(chatml: Any, name: str) -> None:
    dataset = load_dataset([ROWS[name]], chatml)
    assert dataset.rendered(0) == [
        (USER.format("hello"), False), (ANSWER.format("the cat"), True), ("\n", False),
    ]  # fmt: skip
    row = dataset[0]
    assert row["input_ids"] == chatml.tokenize_messages([*map(_message, CHAT)])[0]
    assert [label for label in row["labels"] if label != IGNORE_INDEX] == [
        *chatml.encode("the cat", False, False), chatml.eos_id,
    ]  # fmt: skip
    assert all(label in (IGNORE_INDEX, i) for label, i in zip(row["labels"], row["input_ids"], strict=True))


def _message(turn: dict[str, str]) -> Any:
    from tt_data import Message

    return Message(**turn)


def test_alpaca_rows_without_a_chat_template_use_the_alpaca_prompt(llama: Any) -> None:
    rows = [ROWS["alpaca"], {"instruction": "Sort", "input": "b a", "output": "a b", "extra": 1}]
    dataset = load_dataset(rows, llama)
    assert whole(dataset, 0).replace("<s> ", "<s>") == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nhello\n\n### Response:\nthe cat</s>"
    )
    assert trained(dataset, 0)[-1].strip() == "the cat</s>"
    assert "### Input:\nb a\n\n### Response:\na b" in whole(dataset, 1)


def test_completions_train_the_answer_and_its_end(llama: Any, chatml: Any) -> None:
    for tokenizer, start in ((llama, [1]), (chatml, [])):
        row = load_dataset([ROWS["prompt_completion"]], tokenizer)[0]
        ids = [*start, *tokenizer.encode("hello the cat", False, False), tokenizer.eos_id]
        assert row["input_ids"] == ids
        prompt = len(start) + len(tokenizer.encode("hello", False, False))
        assert row["labels"][:prompt] == [IGNORE_INDEX] * prompt
        assert row["labels"][prompt:] == ids[prompt:]


def test_text_is_trained_whole_with_eos(llama: Any) -> None:
    row = load_dataset([ROWS["text"]], llama)[0]
    assert row["input_ids"] == llama.encode("hello the cat")
    assert row["labels"] == row["input_ids"]


def test_pretokenized_ids_stay_as_they_are(chatml: Any) -> None:
    rows = [ROWS["pretokenized"], {"input_ids": [1, 2, 3], "assistant_masks": [0, 1, 1]},
            {"input_ids": [1, 2, 4], "completion_mask": [0, 0, 1]}, {"input_ids": [4, 5]}]  # fmt: skip
    dataset = load_dataset(rows, chatml)
    assert [dataset[i]["labels"] for i in range(4)] == [
        [-100, -100, 7, 8], [-100, 2, 3], [-100, -100, 4], [4, 5],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 99999]}, "unknown id"),
        ({"input_ids": [1, 2], "labels": [1]}, "wrong length"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "wrong labels"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": "abc"}, "wrong type"),
    ],
)
def test_wrong_ids_are_refused(chatml: Any, row: dict[str, Any], reason: str) -> None:
    dataset = load_dataset([ROWS["pretokenized"], row], chatml)
    assert dataset.report["dropped"] == {reason: 1}


def test_train_on_says_what_is_trained(chatml: Any) -> None:
    turns = [*CHAT, {"role": "user", "content": "and"}, {"role": "assistant", "content": "fine"}]
    text = USER.format("hello") + ANSWER.format("the cat") + "\n" + USER.format("and") + ANSWER.format("fine") + "\n"
    expected = {"assistant": ["the cat<|im_end|>", "fine<|im_end|>"], "last": ["fine<|im_end|>"], "all": [text]}
    for train_on, texts in expected.items():
        dataset = load_dataset([{"messages": turns}], chatml, train_on=train_on)
        assert trained(dataset) == texts
        assert whole(dataset) == text
    for train_on, texts in {"assistant": ["the cat<|im_end|>"], "all": ["hello the cat<|im_end|>"]}.items():
        assert trained(load_dataset([ROWS["prompt_completion"]], chatml, train_on=train_on)) == [
            texts[0].replace("the cat", " the cat") if train_on == "assistant" else texts[0]
        ]
    with pytest.raises(ValueError, match="train_on must be one of assistant, last, all, got 'answer'"):
        load_dataset([ROWS["text"]], chatml, train_on="answer")


def test_weights_switch_a_turn_off(chatml: Any) -> None:
    turns = [*CHAT, {"role": "user", "content": "and"}, {"role": "assistant", "content": "fine"}]
    for key, value in (("weight", 0), ("loss", False), ("train", False)):
        marked = [dict(turn) for turn in turns]
        marked[1][key] = value
        assert trained(load_dataset([{"messages": marked}], chatml)) == ["fine<|im_end|>"]
        marked[1][key] = 1
        assert len(trained(load_dataset([{"messages": marked}], chatml))) == 2
    marked[1]["weight"] = 0.5
    with pytest.raises(ValueError, match="weight 0.5, expected 0 or 1"):
        load_dataset([{"messages": marked}], chatml)


def test_content_lists_are_joined(chatml: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}, CHAT[1]]
    assert whole(load_dataset([{"messages": turns}], chatml)) == whole(load_dataset([ROWS["openai"]], chatml))
    turns[0] = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    with pytest.raises(ValueError, match="message 0 has a part of type 'image_url'; only text is supported"):
        load_dataset([{"messages": turns}], chatml)


def test_calls_written_as_json_text_are_read(chatml: Any) -> None:
    source = "{{ tools | length if tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}"
    source += "{{ c.function.arguments.q }}"
    tokenizer = chatml.with_template({"default": source + "{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"}, "t")
    call = {"function": {"name": "f", "arguments": '{"q": "found"}'}}
    turns = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        CHAT[1],
    ]
    dataset = load_dataset([{"messages": turns, "tools": json.dumps([{"name": "f"}])}], tokenizer)
    assert whole(dataset) == "1hello<|im_end|>found<|im_end|>1<|im_end|>the cat<|im_end|>"
    call["function"]["arguments"] = "{"
    with pytest.raises(ValueError, match="arguments of a call in message 1 is text but not JSON"):
        load_dataset([{"messages": turns}], tokenizer)


def test_columns_map_our_names_to_theirs(chatml: Any, llama: Any) -> None:
    short = {"instruction": "q", "input": "i", "output": "a"}
    same = [
        load_dataset([ROWS["openai"]], chatml),
        load_dataset([{"conv": CHAT, "text": "x"}], chatml, columns={"messages": "conv"}),
        load_dataset([{"q": "hello", "a": "the cat"}], chatml, columns={"instruction": "q", "output": "a"}),
        load_dataset([{"q": "hello", "i": "", "a": "the cat"}], chatml, columns=short),
    ]
    assert len({tuple(dataset[0]["input_ids"]) for dataset in same}) == 1
    mapped = load_dataset([{"q": "hello", "i": "more", "a": "b"}], llama, columns=short)
    assert "### Input:\nmore" in whole(mapped)
    with pytest.raises(
        ValueError, match=r"columns maps messages to 'convo', but the row has \['conv'\]; did you mean 'conv'"
    ):
        load_dataset([{"conv": CHAT}], chatml, columns={"messages": "convo"})
    with pytest.raises(ValueError, match="tt_data reads no column 'mesages'.*did you mean 'messages'"):
        load_dataset([{"conv": CHAT}], chatml, columns={"mesages": "conv"})


def test_template_chooses_another(chatml: Any, llama: Any) -> None:
    assert "### Response:" in whole(load_dataset([ROWS["alpaca"]], chatml, template="alpaca"))
    plain = whole(load_dataset([ROWS["openai"]], llama, template="plain"))
    assert plain.split() == "<s> User: hello Assistant: the cat</s>".split()
    assert whole(load_dataset([{"dialogue": "a b", "output": "c"}], llama, template="summarize")) == (
        "<s> Summarize this dialogue:\na b\n---\nSummary:\nc</s>"
    )
    with pytest.raises(ValueError, match="unknown template 'chatlm'.*did you mean 'chatml'"):
        load_dataset([ROWS["openai"]], llama, template="chatlm")


def test_schema_names_how_to_read(chatml: Any) -> None:
    row = {"text": "hello", "prompt": "a", "completion": "b"}
    assert load_dataset([row], chatml).report["schema"] == "prompt_completion"
    assert trained(load_dataset([row], chatml, schema="text")) == ["hello<|im_end|>"]
    with pytest.raises(ValueError, match="unknown schema 'txt'.*did you mean 'text'"):
        load_dataset([row], chatml, schema="txt")


def test_truncation_keeps_the_start_and_is_counted(chatml: Any) -> None:
    rows = [{"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant", "content": "the cat sat on a mat " * 9}]}]
    full = load_dataset(rows, chatml)
    limit = full.length(0)
    dataset = load_dataset(rows, chatml, max_seq_len=limit)
    assert dataset.report["truncated"] == 1
    assert [dataset.is_truncated(i) for i in (0, 1)] == [False, True]
    for i in (0, 1):
        for key in ("input_ids", "labels"):
            assert dataset[i][key] == full[i][key][:limit]
    assert chatml.eos_id not in dataset[1]["labels"]  # a cut answer does not learn to stop


def test_duplicates_are_counted_and_dropped(chatml: Any) -> None:
    rows = [ROWS["openai"], ROWS["openai"], {"messages": [*CHAT, {"role": "user", "content": "x"}, CHAT[1]]}]
    assert load_dataset(rows, chatml).report["dropped"] == {"duplicate": 1}
    assert len(load_dataset(rows, chatml, drop_duplicates=False)) == 3
    with pytest.raises(ValueError, match=r"1 of 3 rows is bad \(1 duplicate\), on_bad_row is error: rows:1: the same"):
        load_dataset(rows, chatml, on_bad_row="error")


def test_where_names_file_and_line(chatml: Any, write_jsonl: Callable[..., Path]) -> None:
    first = write_jsonl([ROWS["openai"]], "a.jsonl")
    second = write_jsonl([{"instruction": "x", "output": ""}, ROWS["alpaca"] | {"output": "b"}], "b.jsonl")
    dataset = load_dataset([first, second], chatml)
    assert [dataset.where(i) for i in range(2)] == [f"{first}:1", f"{second}:2"]
    assert dataset.report["schema"] == "openai+alpaca"
    assert dataset.report["problems"] == [f"{second}:1: column 'output' is empty"]


def test_the_fingerprint_changes_with_everything_that_changes_rows(chatml: Any, write_jsonl: Any) -> None:
    path = write_jsonl([ROWS["openai"], ROWS["openai"]])
    base = load_dataset(path, chatml).fingerprint
    assert load_dataset(path, chatml).fingerprint == base
    assert len(base) == 64
    others = [
        load_dataset(path, chatml, train_on="last").fingerprint,
        load_dataset(path, chatml, max_seq_len=30).fingerprint,
        load_dataset(path, chatml, max_seq_len=30, packing=True).fingerprint,
        load_dataset(path, chatml, max_seq_len=30, packing=True, seed=1).fingerprint,
        load_dataset(path, chatml, drop_duplicates=False).fingerprint,
        load_dataset(
            path, chatml.with_template({"default": "{{ messages[1].content }}"}, "t"), train_on="all"
        ).fingerprint,
        load_dataset(write_jsonl([ROWS["openai"]], "b.jsonl"), chatml).fingerprint,
    ]
    assert len({base, *others}) == 1 + len(others)


def test_rows_can_be_indexed_like_a_list(chatml: Any) -> None:
    dataset: TokenDataset = load_dataset([{"text": "a"}, {"text": "b"}], chatml)
    assert dataset[-1] == dataset[1]
    assert len(list(dataset)) == 2
    with pytest.raises(IndexError):
        dataset[2]


def test_user_functions_can_be_registered(chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tt_data import Schema, register_schema
    from tt_data.examples import Completion
    from tt_data.rows import schemas

    monkeypatch.setattr(schemas, "SCHEMAS", dict(schemas.SCHEMAS))
    register_schema(Schema("quiz", (("q",), ("a",)), lambda row, columns: Completion(f"Q: {row['q']} ", row["a"])))
    dataset = load_dataset([{"q": "hello", "a": "the cat", "text": "x"}], chatml)
    assert dataset.report["schema"] == "quiz"
    assert whole(dataset) == "Q: hello the cat<|im_end|>"


def test_the_collector_of_circles_is_as_it_was_after_rows_are_encoded(chatml: Tokenizer) -> None:
    import gc

    for collects in (True, False):
        (gc.enable if collects else gc.disable)()
        try:
            load_dataset([{"text": "one"}, {"text": ""}], chatml)
            with pytest.raises(ValueError, match="none can be used"):
                load_dataset([{"text": ""}], chatml)
            assert gc.isenabled() == collects
        finally:
            gc.enable()
