"""Turns as tools write them: calls in older forms, keys that switch the loss off, JSON text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tt_data import Message, load_dataset, sharegpt_to_llama2_messages, validate_messages
from tt_data.examples import BadRowError
from tt_data.rows.conversations import as_turns, read_messages

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"name": "f", "arguments": {"q": "x"}}
CALLED = [{"type": "function", "function": CALL}]


def trained(dataset: Any) -> str:
    return "".join(text for text, on in dataset.rendered(0) if on)


@pytest.mark.parametrize("key", [
    "weight", "loss", "loss_weight", "loss_mask", "train", "training", "trainable", "train_on", "masked", "mask",
])  # fmt: skip
def test_a_key_that_switches_loss_off_elsewhere_does_so_here(chatml: Any, key: str) -> None:
    masks = key.startswith("mask")
    for off in (True, 1, 1.0) if masks else (False, 0, 0.0):
        turns = [U, {**A, "content": "red", key: off}, U, {**A, "content": "blue", key: not off}]
        assert trained(load_dataset([{"messages": turns}], chatml)) == "blue<|im_end|>"
        assert all(key not in message.extra for message in read_messages(turns))


def test_one_key_that_masks_is_enough() -> None:
    assert [m.masked for m in read_messages([U, {**A, "weight": 1, "mask": True, "train": None}])] == [False, True]


@pytest.mark.parametrize(("key", "on"), [("train", True), ("weight", 1), ("training", True), ("masked", False)])
def test_a_turn_that_says_it_is_trained_and_is_not_is_reported(chatml: Any, key: str, on: Any) -> None:
    turns = [{"role": "system", "content": "b"}, {**U, key: on}, A, U, A]
    note = "some messages with weight: 1, train: true or their like are not trained"

    def notes(*rows: Any, **settings: Any) -> list[str]:
        return [said for said in load_dataset(list(rows), chatml, **settings).report["notes"] if note in said]

    (said,) = notes({"messages": turns}, {"messages": [U, A]})
    assert "train_on=assistant trains the assistant's turns; train_on=all trains all turns" in said
    assert said.endswith("(1 row, the first at rows:0)")
    assert not notes({"messages": turns}, train_on="all")
    assert not notes({"messages": [{**turns[0], key: not on}, {**U, key: not on}, {**A, key: on}, U, A]})
    answers = {"messages": [U, {**A, key: on}, U, A]}
    assert "train_on=last trains the last answer" in notes(answers, train_on="last")[0]
    assert not notes(answers)


@pytest.mark.parametrize(("key", "value"), [("weight", 0.5), ("loss_weight", 2), ("train", "no"), ("mask", [0, 1])])
def test_a_weight_that_is_neither_0_nor_1_is_a_bad_row(chatml: Any, key: str, value: Any) -> None:
    rows = [{"messages": [U, A]}, {"messages": [U, {**A, key: value}]}]
    assert load_dataset(rows, chatml).report["problems"] == [
        f"rows:1: message 1 has {key} {value!r}, expected 0 or 1 (true or false)"
    ]


def test_a_mask_of_parts_of_a_turn_is_a_bad_row(chatml: Any) -> None:
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    rows = [{"messages": [U, A]}, {"messages": [U, {**A, "train_detail": detail}]}]
    assert "message 1 has train_detail: only whole turns" in load_dataset(rows, chatml).report["problems"][0]


@pytest.mark.parametrize("role", ["function_call", "tool_call", "Function_Call"])
def test_sharegpts_call_is_an_assistant_turn_and_its_observation_a_tools(role: str) -> None:
    for value in (json.dumps(CALL), CALL, json.dumps([CALL]), json.dumps(CALLED)):
        turns = [{"from": "human", "value": "a"}, {"from": role, "value": value}, {"from": "observation", "value": "7"}]
        user, call, tool = read_messages([*turns, {"from": "gpt", "value": "b"}])[:3]
        assert (user.role, call.role, tool.role) == ("user", "assistant", "tool")
        assert call.to_dict() == {"role": "assistant", "content": None, "tool_calls": CALLED}


def test_words_and_the_calls_behind_them_are_one_turn() -> None:
    call = {"from": "function_call", "value": json.dumps(CALL)}
    words = {"from": "gpt", "value": "let me look"}
    messages = read_messages([{"from": "human", "value": "a"}, words, call, call])
    assert [message.to_dict() for message in messages[1:]] == [
        {"role": "assistant", "content": "let me look", "tool_calls": CALLED * 2}
    ]
    with pytest.raises(ValueError, match="message 2 is a call of message 1: only one of them is masked"):
        read_messages([{"from": "human", "value": "a"}, {**words, "train": False}, call])


def test_a_call_that_is_not_json_is_a_bad_row(chatml: Any) -> None:
    for value, text in (("{'name': 1}", "the call in message 1 is text but not JSON"), ("7", "message 1 is a call")):
        row = {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]}
        good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
        assert text in load_dataset([good, row], chatml).report["problems"][0]


def test_the_older_function_call_is_a_tool_call() -> None:
    for arguments in ('{"q": "x"}', {"q": "x"}):  # as the row has them: the template decides which form it wants
        function = {"name": "f", "arguments": arguments}
        older = {"role": "assistant", "content": None, "function_call": function}
        newer = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        answer = {"role": "function", "name": "f", "content": "7"}
        _, call, result, _ = read_messages([U, older, answer, A])
        assert call.to_dict() == read_messages([U, newer])[1].to_dict() == newer
        assert (result.role, result.extra) == ("tool", {"name": "f"})


def test_no_calls_are_no_key() -> None:
    for empty in ({"tool_calls": []}, {"tool_calls": None}, {"function_call": None}):
        assert read_messages([U, {**A, **empty}])[1] == Message("assistant", "b")
    with pytest.raises(ValueError, match="the assistant message 1 is empty"):
        read_messages([U, {**A, "content": "", "tool_calls": []}])


def test_turns_are_read_from_json_text_and_other_text_stays_text() -> None:
    assert as_turns(json.dumps([U, A])) == [U, A]
    assert as_turns(json.dumps(A)) == [A]
    assert as_turns(A) == [A]
    for text in ("[INST] hi [/INST]", "[1, 2]", "[]", '{"answer": 4}', '[{"name": "f"}]', "plain", "{broken"):
        assert as_turns(text) is None


def test_there_is_one_system_message() -> None:
    system = Message("system", "s")
    turns = [Message("user", "a"), Message("assistant", "b")]
    validate_messages([system, Message("developer", "d"), *turns])
    with pytest.raises(ValueError, match="a second system message at message 1"):
        validate_messages([system, system, *turns])


def test_sharegpt_rows_become_messages_under_torchtunes_name() -> None:
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    sample = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    roles = ("system", "user", "assistant", "user", "assistant")
    for train_on_input in (False, True):
        assert sharegpt_to_llama2_messages(sample, train_on_input) == [
            Message(role, text, masked=role != "assistant" and not train_on_input)
            for role, (_, text) in zip(roles, turns, strict=True)
        ]
    with pytest.raises(ValueError, match="no column 'conversations', the row has 'messages'"):
        sharegpt_to_llama2_messages({"messages": []})


def test_turns_in_columns_are_turns(chatml: Any) -> None:
    """As ``datasets`` stores a sequence of objects: an object of lists."""
    rows = [
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        {"prompt": {"role": ["user"], "content": ["a"]}, "completion": {"role": ["assistant"], "content": ["b"]}},
        {"messages": json.dumps({"role": ["user", "assistant"], "content": ["a", "b"]})},
    ]
    expected = load_dataset([{"messages": [U, A]}], chatml)[0]
    assert [load_dataset([row], chatml)[0] for row in rows] == [expected] * 4
    uneven = {"messages": {"role": ["user", "assistant"], "content": ["a"]}}
    assert "expected a list of messages, found dict" in load_dataset([rows[0], uneven], chatml).report["problems"][0]


def test_a_wrong_turn_names_its_column(chatml: Any) -> None:
    rows = [{"prompt": "p ", "chosen": "a", "rejected": text} for text in ("b", [7, "c"])]
    (problem,) = load_dataset(rows, chatml).report["problems"]
    assert problem == "rows:1: column 'rejected': message 0 is int, expected an object with role and content"


def test_a_system_message_or_a_tools_answer_may_say_nothing(chatml: Any) -> None:
    expected = load_dataset([{"messages": [U, A]}], chatml)[0]
    for nothing in ("", " ", None):
        system = {"role": "system", "content": nothing}
        assert load_dataset([{"messages": [system, U, A]}], chatml)[0] == expected
        call = {"role": "assistant", "content": None, "tool_calls": CALLED}
        assert [m.content for m in read_messages([U, call, {"role": "tool", "content": nothing}, A])][2] == (
            nothing or ""
        )


@pytest.mark.parametrize("words", ["Hello", " Hello", "\n", "", "x" * 5000])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_turn_of_a_role_and_words_alone_is_read_as_one_with_more_keys(role: str, words: str) -> None:
    def read(turn: dict[str, object]) -> object:
        try:
            return read_messages([{"role": "user", "content": "Hi"}, turn])
        except BadRowError as bad:
            return bad.reason, str(bad)

    assert read({"role": role, "content": words}) == read({"role": role, "content": words, "weight": None})
