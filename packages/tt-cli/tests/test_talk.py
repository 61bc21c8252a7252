"""Pieces of text while tokens arrive."""

import pytest

from tt_cli.talk import pieces, prompt_form


def bytes_decoder(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_text_arrives_token_by_token():
    assert list(pieces(iter(b"abc"), bytes_decoder)) == ["a", "b", "c"]


def test_a_character_of_several_tokens_arrives_whole():
    assert list(pieces(iter("a\u20acb\U0001f600".encode()), bytes_decoder)) == ["a", "\u20ac", "b", "\U0001f600"]


def test_what_never_becomes_whole_is_shown_at_the_end():
    assert list(pieces(iter("a\u20ac".encode()[:-1]), bytes_decoder)) == ["a", "\ufffd"]


def test_a_decoder_that_drops_the_leading_space_loses_nothing():
    words = {1: " red", 2: " and", 3: " blue"}
    assert list(pieces(iter([1, 2, 3]), lambda ids: "".join(words[i] for i in ids).lstrip())) == [
        "red",
        " and",
        " blue",
    ]


def test_nothing_generated_is_no_text():
    assert list(pieces(iter([]), bytes_decoder)) == []


@pytest.mark.parametrize(("report", "template", "has_chat_template", "form"), [
    ({}, None, True, "chat"),
    ({}, None, False, "text"),
    ({"schema": "openai", "form": "chat"}, None, True, "chat"),
    ({"schema": "alpaca", "form": "chat"}, None, True, "chat"),
    ({"schema": "alpaca", "form": "text"}, None, False, "alpaca"),
    ({"schema": "alpaca", "form": "chat"}, "chatml", True, "chat"),
    ({"schema": "instruct:alpaca", "form": "text"}, "alpaca", True, "alpaca"),
    ({"schema": "instruct:summarize", "form": "text"}, "summarize", True, "summarize"),
    ({"schema": "prompt_completion", "form": "text"}, None, True, "text"),
    ({"schema": "prompt_completion", "form": "chat"}, None, True, "chat"),  # of messages
    ({"schema": "prompt_completion+text", "form": "text"}, None, True, "text"),
    ({"schema": "alpaca+text", "form": "chat+text"}, None, True, "chat"),
    ({"schema": "openai", "form": ""}, None, True, "chat"),  # a stream that was stopped
])  # fmt: skip
def test_a_prompt_has_the_form_that_its_rows_had(report, template, has_chat_template, form):
    assert prompt_form(report, template, has_chat_template=has_chat_template) == form
