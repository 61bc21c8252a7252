"""Pieces of text while tokens arrive."""

import random

import pytest

from tt_cli.reply import Stats, Text
from tt_cli.talk import prompt_form


def bytes_decoder(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def pieces(tokens, decode, stop=()):
    """What is given token by token, and at the end."""
    text = Text(decode, stop)
    found = []
    for token in tokens:
        found.append(text.add(token))
        if text.stopped:
            break
    return [piece for piece in [*found, text.end()] if piece]


def test_text_arrives_token_by_token():
    assert pieces(b"abc", bytes_decoder) == ["a", "b", "c"]


def test_a_character_of_several_tokens_arrives_whole():
    assert pieces("a\u20acb\U0001f600".encode(), bytes_decoder) == ["a", "\u20ac", "b", "\U0001f600"]


def test_what_never_becomes_whole_is_shown_at_the_end():
    assert pieces("a\u20ac".encode()[:-1], bytes_decoder) == ["a", "\ufffd"]


def test_a_decoder_that_drops_the_leading_space_loses_nothing():
    words = {1: " red", 2: " and", 3: " blue"}
    assert pieces([1, 2, 3], lambda ids: "".join(words[i] for i in ids).lstrip()) == ["red", " and", " blue"]


def test_nothing_generated_is_no_text():
    assert pieces([], bytes_decoder) == []


@pytest.mark.parametrize("decode", [bytes_decoder, lambda ids: bytes_decoder(ids).lstrip()])
@pytest.mark.parametrize("seed", range(8))
def test_a_long_text_is_the_same_though_only_its_end_is_decoded_again(decode, seed):
    words = random.Random(seed).choices(["red ", " ", "\u20ac", "\U0001f600", "e\u0301", "\n", "\ufffd"], k=300)
    tokens = "".join(words).encode()
    if seed % 2:
        tokens = tokens[:70] + bytes([0xE2, 0x82, 0x41, 0xFF]) + tokens[70:]  # not UTF-8
    sizes = []
    found = pieces(tokens, lambda ids: sizes.append(len(ids)) or decode(ids))
    assert "".join(found) == decode(list(tokens))
    assert max(sizes) <= 110


def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_shown():
    assert pieces(b"red, blue\nQ: and", bytes_decoder, ["\nQ:", "green"]) == [*"red, blue"]
    assert pieces(b"red, gree", bytes_decoder, ["green"]) == ["r", "e", "d", ",", " ", "gree"]
    assert pieces(b"aab", bytes_decoder, ["ab"]) == ["a"]
    assert pieces(b"green", bytes_decoder, ["green"]) == []


def test_of_several_stop_texts_in_one_token_the_first_in_the_text_counts():
    assert pieces([1], lambda _: "one two three", ["three", "two"]) == ["one "]


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


def test_the_lines_of_stats_fit_a_terminal_of_80_columns(capsys):
    stats = Stats(prompt_tokens=123_456, tokens=12_345, prompt_seconds=9.0, seconds=99.0, first_token_seconds=12.34)
    stats.peak_memory_gib = 123.4
    stats.show()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["prompt", "answer"]
    assert max(map(len, lines)) <= 80
