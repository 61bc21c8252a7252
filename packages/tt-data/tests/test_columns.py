"""Columns beside the ones that a schema needs: read if their meaning is known, else named in the report."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tt_data import (
    InstructTemplate,
    Schema,
    batches,
    chat_dataset,
    instruct_dataset,
    load_dataset,
    register_schema,
)
from tt_data.examples import Completion, Text
from tt_data.rows import schemas

U, A = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "red"}


def whole(dataset: Any, i: int = 0) -> str:
    return "".join(text for text, _ in dataset.rendered(i))


def trained(dataset: Any, i: int = 0) -> str:
    return "".join(text for text, on in dataset.rendered(i) if on)


def turns(*pairs: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in pairs)


def test_context_is_the_input_of_an_instruction(chatml: Any, llama: Any) -> None:
    row = {"instruction": "Who won?", "context": "Red beat green.", "response": "red", "category": "qa"}
    dataset = load_dataset([row], chatml)
    assert whole(dataset) == turns(("user", "Who won?\n\nRed beat green."), ("assistant", "red"))
    assert dataset.report["notes"] == ["columns that are not read: 'category' (1 row), the first at rows:0"]
    assert "### Input:\nRed beat green.\n" in whole(load_dataset([row], llama))
    assert "### Input:\nRed beat green.\n" in whole(load_dataset([row], chatml, template="alpaca"))
    both = load_dataset([{**row, "input": "x", "category": None}], chatml)
    assert "'context' (1 row)" in both.report["notes"][0]


@pytest.mark.parametrize("history", [[["Say one.", "one"]], [{"role": "user", "content": "Say one."},
                                                            {"role": "assistant", "content": "one"}]])  # fmt: skip
def test_history_is_earlier_turns(chatml: Any, history: Any) -> None:
    expected = turns(("user", "Say one."), ("assistant", "one"), ("user", "hello"), ("assistant", "red"))
    for value in (history, json.dumps(history)):
        alpaca = load_dataset([{"instruction": "hello", "input": "", "output": "red", "history": value}], chatml)
        assert whole(alpaca) == expected
        assert trained(alpaca) == "one<|im_end|>red<|im_end|>"
        assert alpaca.report["notes"] == []
        answered = load_dataset([{"prompt": "hello", "completion": "red", "history": value}], chatml)
        assert (whole(answered), trained(answered)) == (expected, "red<|im_end|>")
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c", "history": ["d"]}]
    assert (
        "rows:1: history is not [[question, answer], ...] or messages"
        in load_dataset(rows, chatml).report["problems"][0]
    )


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("row", [
    {"prompt": [U], "completion": [A]}, {"prompt": "hello", "completion": "red"}, {"messages": [U, A]},
    {"instruction": "hello", "output": "red"},
])  # fmt: skip
def test_a_system_column_is_the_system_message(chatml: Any, column: str, row: dict[str, Any]) -> None:
    dataset = load_dataset([{column: "Be brief.", **row}, {column: "", **row}], chatml)
    assert whole(dataset) == turns(("system", "Be brief."), ("user", "hello"), ("assistant", "red"))
    assert whole(dataset, 1) == turns(("user", "hello"), ("assistant", "red"))
    assert trained(dataset) == "red<|im_end|>"
    assert dataset.report["notes"] == []


def test_two_system_messages_that_differ_are_a_bad_row(chatml: Any) -> None:
    mine = {"role": "system", "content": "Be brief."}
    rows = [{"system": text, "messages": [mine, U, A]} for text in ("Be brief.", "Be long.")]
    report = load_dataset(rows, chatml).report
    assert (report["rows"], report["dropped"]) == (1, {"two system messages": 1})


def test_functions_are_tools(chatml: Any) -> None:
    writes = chatml.with_template(
        {"default": "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"},
        "t",
    )
    schema = {"name": "f", "parameters": {}}
    for functions in ([schema], json.dumps([schema])):
        dataset = load_dataset([{"functions": functions, "messages": [U, A]}], writes, train_on="all")
        assert json.loads(whole(dataset).partition("hello")[0]) == [{"type": "function", "function": schema}]
        (note,) = load_dataset([{"functions": functions, "messages": [U, A]}], chatml).report["notes"]
        assert "does not write tools (functions)" in note


def test_columns_that_nothing_reads_are_named_with_the_nearest(chatml: Any) -> None:
    rows = [{"messages": [U, {**A, "content": f"{i}"}], "systm": "Be brief.", "id": i, "tags": []} for i in range(3)]
    assert load_dataset([*rows, {"messages": [U, A]}], chatml).report["notes"] == [
        "columns that are not read: 'systm' (3 rows; did you mean columns={'system': 'systm'}?), 'id' (3 rows), "
        "the first at rows:0"
    ]


def test_a_row_that_fits_two_schemas_names_the_other(chatml: Any) -> None:
    row = {"prompt": "hello", "messages": [U, A], "chosen": [U, A], "rejected": [U, {**A, "content": "blue"}]}
    dataset = load_dataset([row], chatml)
    assert dataset.schema == "preference"
    assert "'messages' (1 row; schema=openai reads it)" in dataset.report["notes"][0]
    assert trained(load_dataset([row], chatml, schema="openai")) == "red<|im_end|>"


def test_a_message_of_a_tree_is_not_a_text(chatml: Any) -> None:
    row = {"message_id": "b", "parent_id": "a", "message_tree_id": "a", "role": "prompter", "text": "hello"}
    for columns in (row, {"parent_id": None, "text": "hello"}, {"role": "assistant", "text": "hello"}):
        with pytest.raises(ValueError, match="a row is one message here .* write each conversation as one row first"):
            load_dataset([columns], chatml)
    for columns in ({"id": 0, "role": "user", "message": "hello"}, {"from": "human", "value": "hello"}):
        with pytest.raises(ValueError, match="a row is one message here"):
            load_dataset([columns], chatml)
    assert whole(load_dataset([row], chatml, schema="text")).startswith("hello")
    assert whole(load_dataset([{"text": "hello", "role": "teacher"}], chatml)).startswith("hello")


def test_questions_and_answers_get_a_suggestion(chatml: Any) -> None:
    for prompt, completion in (("question", "answer"), ("input", "output"), ("problem", "solution")):
        hint = f"did you mean columns={{'prompt': '{prompt}', 'completion': '{completion}'}}?"
        with pytest.raises(ValueError, match=re.escape(hint)):
            load_dataset([{prompt: "a", completion: "b"}], chatml)


@pytest.mark.parametrize("name", ["messages", "text", "prompt", "completion", "chosen", "rejected"])
def test_turns_are_read_from_json_text_in_every_column(chatml: Any, name: str) -> None:
    row = {
        "messages": {"messages": [U, A]}, "text": {"text": [U, A]}, "prompt": {"prompt": [U], "completion": "red"},
        "completion": {"prompt": "hello", "completion": [A]},
        "chosen": {"prompt": "hello", "chosen": [A], "rejected": "blue"},
        "rejected": {"prompt": "hello", "chosen": "blue", "rejected": [U, A]},
    }[name]  # fmt: skip
    found = [load_dataset([{**row, name: value}], chatml) for value in (row[name], json.dumps(row[name]))]
    assert found[0][0] == found[1][0]
    assert ("<|im_start|>user\nhello<|im_end|>\n", False) not in found[1].rendered(0)
    assert '"role"' not in whole(found[1])
    assert "red<|im_end|>" in trained(found[1])


def test_a_mistake_in_a_converter_names_file_line_and_what_is_wrong(
    chatml: Any, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "SCHEMAS", dict(schemas.SCHEMAS))
    path = write_jsonl([{"q": "a", "a": "b"}, {"q": "c"}])
    for streaming in (False, True):
        answers: list[tuple[Any, str]] = [
            (lambda row, columns: Completion(row["q"], row["a"]), r"rows.jsonl:2: .* failed: KeyError: 'a'"),
            (
                lambda row, columns: None,
                "rows.jsonl:1: .*it returned NoneType, expected one of Conversation, Completion",
            ),
            (lambda row, columns: Text(5), "rows.jsonl:1: .*a text of Text is int"),  # type: ignore[arg-type]
        ]
        for read, text in answers:
            register_schema(Schema("mine", (("q",),), read))
            with pytest.raises(ValueError, match=text) as refusal:
                next(batches(load_dataset(path, chatml, streaming=streaming), batch_size=2))
            assert "\n" not in str(refusal.value)


IDS = list(range(300, 308))


def test_masks_of_ids_are_folded_into_the_labels(chatml: Any) -> None:
    def labels(**row: Any) -> list[int]:
        return list(load_dataset([{"input_ids": IDS, **row}], chatml)[0]["labels"])

    one, two = [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]
    both = [i if a and b else -100 for i, a, b in zip(IDS, one, two, strict=True)]
    assert labels(completion_mask=two, assistant_masks=one) == both
    given = [-100, 301, 302, 303, -100, 305, 306, 307]
    assert labels(labels=given, completion_mask=two) == [-100, -100, -100, 303, -100, 305, 306, 307]
    assert labels(loss_mask=[float(x) for x in one]) == [i if a else -100 for i, a in zip(IDS, one, strict=True)]


def test_padding_is_taken_off_and_hidden_or_packed_tokens_are_refused(chatml: Any) -> None:
    padded = load_dataset([{"input_ids": IDS, "attention_mask": [0, 0, 1, 1, 1, 1, 0, 0]}], chatml)
    assert padded[0] == {"input_ids": IDS[2:6], "labels": IDS[2:6]}
    left = {"attention_mask": [0, 1, 1, 1, 1, 1, 1, 1], "position_ids": [0, 0, 1, 2, 3, 4, 5, 6]}
    assert load_dataset([{"input_ids": IDS, **left}], chatml)[0]["input_ids"] == IDS[1:]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": [1, 1, 0, 1, 1, 1, 1, 1]}, "attention_mask hides tokens between others"),
        ({"attention_mask": [1, 1, 1, 1, 2, 2, 2, 2]}, "packed rows"),
        ({"position_ids": [0, 1, 2, 3, 0, 1, 2, 3]}, "packed rows"),
        ({"seq_lengths": [4, 4]}, "packed rows"),
        ({"attention_mask": [1, 1]}, "8 input_ids but 2 values in attention_mask"),
    ]
    for more, text in refused:
        report = load_dataset([{"input_ids": IDS}, {"input_ids": IDS, **more}], chatml).report
        assert text in report["problems"][0]


def test_keys_of_messages_that_no_template_writes_are_named(chatml: Any) -> None:
    rated = {"messages": [{**U, "rating": 5}, {**A, "name": "Bo", "score": None}]}
    note = "columns that are not read: 'messages.name' (1 row), 'messages.rating' (1 row), the first at rows:0"
    assert load_dataset([rated], chatml).report["notes"] == [note]
    template = "{% for m in messages %}{{ (m.name or '') + (m.rating or '')|string + m.content }}<|im_end|>{% endfor %}"
    assert load_dataset([rated], chatml.with_template({"default": template}, "t")).report["notes"] == []
    conditional = template.replace("m.name or ''", "m.name if m.role == 'user' and m.name else ''")
    report = load_dataset([rated], chatml.with_template({"default": conditional}, "t")).report
    assert report["notes"] == ["columns that are not read: 'messages.name' (1 row), the first at rows:0"]
    called = {"messages": [U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]}
    formatted = chat_dataset(chatml, source=[called], conversation_style="openai", chat_format="llama2")
    assert "'messages.tool_calls' (1 row)" in formatted.report["notes"][0]


def test_a_mistake_in_ones_own_template_or_transform_has_a_place_too(chatml: Any) -> None:
    def broken(row: Any) -> str:
        raise ValueError("no such thing")

    rows = [{"q": "a", "output": "b"}]
    for template, text in (
        (InstructTemplate(("q",), broken), "rows:0: the converter of these rows failed: ValueError: no such thing"),
        (InstructTemplate(("q",), lambda row: 5), "rows:0: the converter of these rows is wrong: a text of Completion"),
    ):
        with pytest.raises(ValueError, match=text):
            instruct_dataset(chatml, source=rows, template=template)
    with pytest.raises(ValueError, match="rows:0: the converter of these rows failed: KeyError: 'p'"):
        instruct_dataset(chatml, source=rows, template="alpaca", transform=lambda row: {"instruction": row["p"]})
    report = load_dataset([{"text": "a", "label": 1, "labels": "x"}], chatml).report
    assert "'label' (1 row), 'labels' (1 row)" in report["notes"][0]
