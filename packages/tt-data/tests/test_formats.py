"""Messages, instruct templates and chat formats by themselves."""

from __future__ import annotations

from functools import partial

import pytest

from tt_data import (
    AlpacaInstructTemplate,
    ChatMLFormat,
    GrammarErrorCorrectionTemplate,
    InstructTemplate,
    Llama2ChatFormat,
    Message,
    MistralChatFormat,
    StackExchangedPairedTemplate,
    SummarizeTemplate,
    register_instruct_template,
    validate_messages,
)
from tt_data.messages import normal_role
from tt_data.template.prompts import INSTRUCT_TEMPLATES, get_instruct_template

U, A, S, T = (partial(Message, role) for role in ("user", "assistant", "system", "tool"))


def test_messages_know_their_roles() -> None:
    message = Message("user", "a")
    assert (message.role, message.content, message.masked) == ("user", "a", False)
    with pytest.raises(ValueError, match="unknown role 'gpt', expected one of .*; did you mean 'assistant'"):
        Message("gpt", "a")
    assert Message("assistant", "a", extra={"tool_calls": [1]}).to_dict() == {
        "role": "assistant", "content": "a", "tool_calls": [1],
    }  # fmt: skip
    assert [normal_role(name) for name in ("human", "GPT", "ipython", "user")] == ["user", "assistant", "tool", "user"]


@pytest.mark.parametrize(
    "messages",
    [
        [U("a"), A("b")],
        [S("s"), U("a")],
        [S("s"), U("a"), A("")],
        [U("a"), A("b"), T("t"), T("t"), A("c"), U("d")],
        [U("a"), A("b"), T("t"), U("c"), A("d")],
    ],
)
def test_good_conversations_pass(messages: list[Message]) -> None:
    validate_messages(messages)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([U("a")], "needs at least 2 messages, got 1"),
        ([], "needs at least 2 messages, got 0"),
        ([A("a"), U("b")], "assistant before any user turn at message 0"),
        ([S("s"), A("a")], "assistant before any user turn at message 1"),
        ([U("a"), U("b")], "two user turns in a row at message 1"),
        ([U("a"), A("b"), A("c")], "two assistant turns in a row at message 2"),
        ([U("a"), S("s")], "system must come first"),
        ([U(""), A("b")], "the user message 0 is empty"),
        ([S(" "), U("b")], "the system message 0 is empty"),
        ([U("a"), T("t")], "a tool answer without an assistant turn before it at message 1"),
    ],
)
def test_bad_conversations_are_refused(messages: list[Message], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        validate_messages(messages)


def test_instruct_templates_to_the_byte() -> None:
    assert AlpacaInstructTemplate.format({"instruction": "I", "input": "X"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n### Input:\nX\n\n"
        "### Response:\n"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nI\n\n### Response:\n"
    )
    for row in ({"instruction": "I"}, {"instruction": "I", "input": ""}, {"instruction": "I", "input": None}):
        assert AlpacaInstructTemplate.format(row) == without
    assert GrammarErrorCorrectionTemplate.format({"sentence": "S"}) == (
        "Correct this to standard English: S\n---\nCorrected: "
    )
    assert SummarizeTemplate.format({"dialogue": "D"}) == "Summarize this dialogue:\nD\n---\nSummary:\n"
    assert StackExchangedPairedTemplate.format({"prompt": "Q"}) == "Question: Q\n\nAnswer: "
    assert (
        SummarizeTemplate.format({"talk": "D"}, {"dialogue": "talk"}) == "Summarize this dialogue:\nD\n---\nSummary:\n"
    )
    with pytest.raises(ValueError, match="no column 'dialogue', the row has 'talk'"):
        SummarizeTemplate.format({"talk": "D"})


def test_templates_can_be_registered() -> None:
    template = InstructTemplate(("q",), lambda row: f"Q: {row['q']}\nA: ")
    register_instruct_template("quiz", template)
    try:
        assert get_instruct_template("quiz").format({"q": "why"}) == "Q: why\nA: "
    finally:
        del INSTRUCT_TEMPLATES["quiz"]


def contents(messages: list[Message]) -> list[tuple[str, str, bool]]:
    return [(message.role, message.content, message.masked) for message in messages]


def test_llama2_format_to_the_byte() -> None:
    turns = [S("sys"), U("one", masked=True), A("two"), U("three"), A("")]
    assert contents(Llama2ChatFormat.format(turns)) == [
        ("user", "[INST] <<SYS>>\nsys\n<</SYS>>\n\none [/INST] ", True), ("assistant", "two", False),
        ("user", "[INST] three [/INST] ", False), ("assistant", "", False),
    ]  # fmt: skip
    assert contents(Llama2ChatFormat.format([U("one"), A("two")]))[0][1] == "[INST] one [/INST] "


def test_mistral_format_to_the_byte() -> None:
    assert contents(MistralChatFormat.format([U("one"), A("two")])) == [
        ("user", "[INST] one [/INST] ", False), ("assistant", "two", False),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no system message"):
        MistralChatFormat.format([S("sys"), U("one")])


def test_chatml_format_to_the_byte() -> None:
    assert [message.content for message in ChatMLFormat.format([S("sys"), U("one"), A("two")])] == [
        "<|im_start|>system\nsys<|im_end|>\n", "<|im_start|>user\none<|im_end|>\n",
        "<|im_start|>assistant\ntwo<|im_end|>",
    ]  # fmt: skip
