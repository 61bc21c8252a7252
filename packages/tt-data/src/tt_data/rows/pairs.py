"""Preference rows: one prompt and two answers, however the prompt is given.

A file apart from ``converters``: only preference training needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tt_data.examples import BadRowError, Columns, Completion, Conversation, Pair, Row
from tt_data.messages import Message
from tt_data.rows.conversations import CHAT_COLUMNS, as_text, as_turns, cell, find, text, turns_or_text
from tt_data.rows.converters import (
    ADDED,
    InstructReader,
    answered,
    has_turns_before,
    instruction_of,
    refuse_without_end,
    turns_of,
)
from tt_data.template.prompts import INSTRUCT_TEMPLATES
from tt_data.wording import names_of

QUESTIONS = ("question", "query", "input")  # a user's words; instruction may have an input
_MARKER = "\n\nAssistant:"


def read_pair(row: Row, columns: Columns) -> Pair:
    """chosen and rejected, with a prompt or sharing one. Each side gives loss from its first turn that differs."""
    return _read_pair(row, columns, chat=True)


def read_alpaca_as_text(row: Row, columns: Columns) -> Completion | Pair:
    """An instruction and its answer for a model without a chat template: alpaca's prompt."""
    return InstructReader(INSTRUCT_TEMPLATES["alpaca"])(row, columns)


def read_pair_as_text(row: Row, columns: Columns) -> Completion | Pair:
    """A pair for a model without a chat template: a question is plain text, an instruction is written like alpaca's."""
    if find(row, columns, "instruction") and not cell(row, columns, "prompt", optional=True):
        return read_alpaca_as_text(row, columns)
    return _read_pair(row, columns, chat=False)


def _read_pair(row: Row, columns: Columns, *, chat: bool) -> Pair:
    sides = {name: turns_or_text(row, columns, name) for name in ("chosen", "rejected")}
    if sides["chosen"] == sides["rejected"]:
        raise BadRowError("equal answers", "chosen and rejected are the same")
    prompt, asks = _prompt(row, columns, sides)
    has_turns = isinstance(prompt, list) or any(isinstance(side, list) for side in sides.values())
    if has_turns or (chat and prompt and (asks or has_turns_before(row, columns))):
        one, other = (answered(row, columns, prompt, side, name=name) for name, side in sides.items())
        return _from_first_difference(one, other)
    texts = {name: as_text(side, columns.get(name, name)) for name, side in sides.items()}
    if prompt is None:
        return _split_shared_text(row, columns, **texts)
    return Pair(Completion(str(prompt), texts["chosen"]), Completion(str(prompt), texts["rejected"]))


def _prompt(row: Row, columns: Columns, sides: dict[str, Any]) -> tuple[Any, bool]:
    """The prompt (turns, text, or None), and whether its column says that it is a user's words."""
    prompt = cell(row, columns, "prompt", optional=True)
    prompt = as_turns(prompt) or prompt
    if prompt is not None:
        return (prompt if isinstance(prompt, list) else as_text(prompt, "prompt", may_be_empty=True)), False
    if find(row, columns, "instruction"):
        return instruction_of(row, columns), True
    if find(row, columns, *QUESTIONS):
        found = turns_or_text(row, columns, *QUESTIONS)
        return (found if isinstance(found, list) else text(row, columns, *QUESTIONS)), True
    holds_it = any(
        isinstance(side, list) and turns_of(side, name)[0].role != "assistant" for name, side in sides.items()
    )
    if find(row, columns, *CHAT_COLUMNS) and not holds_it:
        return turns_or_text(row, columns, *CHAT_COLUMNS), True
    return None, False


def _from_first_difference(chosen: Conversation, rejected: Conversation) -> Pair:
    """Both sides with loss on the assistant's turns from the first one that differs. Raises BadRowError."""
    refuse_without_end(chosen.messages)
    refuse_without_end(rejected.messages)
    one, other = _compared(chosen.messages), _compared(rejected.messages)
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if [turn for turn in one if turn[0] != "assistant"] != [turn for turn in other if turn[0] != "assistant"]:
        raise BadRowError(
            "not a pair", f"chosen and rejected differ in the prompt (from message {shared}), expected one prompt and "
            "two answers",
        )  # fmt: skip
    return Pair(_masked(chosen, shared), _masked(rejected, shared))


def _compared(messages: Sequence[Message]) -> list[tuple[str, str, Any]]:
    return [(message.role, message.content, message.extra) for message in messages]


def _masked(side: Conversation, shared: int) -> Conversation:
    messages = [
        message if i >= shared and message.role == "assistant" else replace(message, masked=True)
        for i, message in enumerate(side.messages)
    ]
    return replace(side, messages=messages)


def _split_shared_text(row: Row, columns: Columns, chosen: str, rejected: str) -> Pair:
    """The beginning that both texts share is the prompt, up to its last assistant marker, else up to white space.

    Without the marker that is a guess, and it is not made if the row has other text that may be the prompt.
    """
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    marker = chosen.rfind(_MARKER, 0, shared)
    if marker >= 0:
        cut = marker + len(_MARKER)
    else:
        _refuse_to_guess(row, columns)
        cut = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared)) + 1
    if not chosen[cut:].strip() or not rejected[cut:].strip():
        raise BadRowError("empty", "the answer of chosen or of rejected is empty")
    return Pair(Completion(chosen[:cut], chosen[cut:]), Completion(chosen[:cut], rejected[cut:]))


def _refuse_to_guess(row: Row, columns: Columns) -> None:
    known = {columns.get(name, name) for name in ("chosen", "rejected", "prompt", *ADDED)}
    others = [name for name, value in row.items() if name not in known and isinstance(value, str) and value.strip()]
    if others:
        raise BadRowError(
            "no prompt", f"chosen and rejected have no prompt beside them, but the row has the text of "
            f"{names_of(others)}; say which one it is, such as columns={{'prompt': {others[0]!r}}}",
        )  # fmt: skip
