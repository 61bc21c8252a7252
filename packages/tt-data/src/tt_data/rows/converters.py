"""From the columns of a row to an ``Example``: one reader for each schema of ``schemas`` (chats: ``conversations``).

Columns that a reader does not look at are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tt_data.examples import BadRowError, Columns, Completion, Conversation, Judged, Pair, Row, Text, Tokens
from tt_data.messages import Message
from tt_data.rows.conversations import (
    CHAT_COLUMNS,
    SYSTEM,
    TOOLS,
    as_text,
    as_turns,
    cell,
    conversation,
    find,
    numbers,
    read_chat,
    read_messages,
    text,
    turns_or_text,
)
from tt_data.rows.json_values import read_json
from tt_data.template.prompts import InstructTemplate
from tt_data.wording import names_of

INPUT = ("input", "context")  # context: as Dolly calls it
OUTPUT = ("output", "response")
COMPLETION = ("completion", "response")
LABEL = ("label", "kto_tag")
ADDED = (*SYSTEM, "history", *TOOLS, "chat_template_kwargs")  # what a conversation takes beside its turns
_MASKS = ("assistant_masks", "completion_mask", "loss_mask")  # 1: trained
_PACKED = "packed rows (several documents in one) are not read; give each document a row, and pack them with packing"


def read_alpaca(row: Row, columns: Columns) -> Conversation:
    """instruction, input (context), output: a user turn and its answer, after the system message and the history."""
    user = instruction_of(row, columns)
    answer = text(row, columns, *OUTPUT)
    return conversation(row, columns, [*history(row, columns), Message("user", user), Message("assistant", answer)])


def instruction_of(row: Row, columns: Columns) -> str:
    """The instruction and, below it, the input."""
    instruction = text(row, columns, "instruction")
    context = text(row, columns, *INPUT, may_be_empty=True) if find(row, columns, *INPUT) else ""
    return f"{instruction}\n\n{context}" if context else instruction


def has_turns_before(row: Row, columns: Columns) -> bool:
    """Whether other columns hold turns before the prompt, which plain text cannot express."""
    names = (columns.get(name, name) for name in (*SYSTEM, "history"))
    return any(name in row for name in names)


def history(row: Row, columns: Columns) -> list[Message]:
    """Earlier turns: ``[[question, answer], ...]`` or messages, as JSON text too. Raises BadRowError."""
    found = cell(row, columns, "history", optional=True)
    found = as_turns(found) or found
    if isinstance(found, str) and found.strip():
        found = read_json(found, "history")
    if not found:
        return []
    if as_turns(found):
        return read_messages(found)
    pairs = isinstance(found, Sequence) and all(
        isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in found
    )
    if not pairs:
        raise BadRowError("wrong type", "history is not [[question, answer], ...] or messages")
    sides = (("user", "question"), ("assistant", "answer"))
    return [
        Message(role, as_text(value, f"history, {name}"))
        for pair in found
        for (role, name), value in zip(sides, pair, strict=True)
    ]


def read_completion(row: Row, columns: Columns) -> Completion | Conversation:
    """prompt and completion: texts; a conversation if either is turns, or with a system message or a history."""
    prompt, answer = turns_or_text(row, columns, "prompt"), turns_or_text(row, columns, *COMPLETION)
    if not isinstance(prompt, list) and not isinstance(answer, list) and not has_turns_before(row, columns):
        return read_plain_completion(row, columns)
    return answered(row, columns, prompt, answer, name=find(row, columns, *COMPLETION) or COMPLETION[0])


def read_plain_completion(row: Row, columns: Columns) -> Completion:
    """prompt and completion, both text."""
    return Completion(text(row, columns, "prompt", may_be_empty=True), text(row, columns, *COMPLETION))


def answered(row: Row, columns: Columns, prompt: Any, answer: Any, *, name: str) -> Conversation:
    """A prompt (text, turns, or None), masked, and the answer (text or turns) in column ``name``."""
    after = turns_of(answer, name) if isinstance(answer, list) else [Message("assistant", as_text(answer, name))]
    if isinstance(prompt, list):
        before = turns_of(prompt, "prompt")
    else:
        before = [Message("user", as_text(prompt, "prompt"))] if prompt else []
    before = [*history(row, columns), *before]
    held = _overlap(before, after)
    notes: tuple[str, ...] = ()
    if before and not held and after[0].role in ("system", "developer", "user"):
        notes = (f"the prompt is not among the turns of {name!r}, which begin with their own; the prompt is not read",)
        before = []
    before = [replace(message, masked=True) for message in before[: len(before) - held]]
    return replace(conversation(row, columns, [*before, *after]), notes=notes)


def turns_of(value: Sequence[Any], name: str) -> list[Message]:
    """The messages in column ``name``, which a BadRowError names."""
    try:
        return read_messages(value)
    except BadRowError as bad:
        raise BadRowError(bad.reason, f"column {name!r}: {bad}") from None


def _overlap(before: Sequence[Message], after: Sequence[Message]) -> int:
    """How many of the last messages of ``before`` are repeated at the start of ``after``."""
    one, other = ([(m.role, m.content.strip()) for m in messages] for messages in (before, after))
    return next((k for k in range(min(len(one), len(other)), 0, -1) if one[-k:] == other[:k]), 0)


def read_text(row: Row, columns: Columns) -> Text | Conversation:
    """text: all of it is trained. Turns, as a list or as JSON text, are a conversation."""
    found = turns_or_text(row, columns, "text")
    if not isinstance(found, str) and as_turns(found):
        return Conversation(read_messages(found))
    if isinstance(found, str) and found and not found.isspace():
        return Text(found)
    return Text(text(row, columns, "text"))


def read_tokens(row: Row, columns: Columns) -> Tokens:
    """input_ids, with labels and masks if there are any. Padding is taken off; a packed row is refused."""
    ids = cell(row, columns, "input_ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(type(i) is int and i >= 0 for i in ids):
        raise BadRowError("wrong type", "column 'input_ids' is not a list of ids")
    labels = _as_long(numbers(row, columns, "labels"), ids, "labels") or list(ids)
    if any(label not in (-100, i) for label, i in zip(labels, ids, strict=True)):
        raise BadRowError(
            "wrong labels", "labels must be -100 or equal to input_ids (they are aligned; the loss shifts)"
        )
    for name in _MASKS:
        mask = _as_long(numbers(row, columns, name), ids, name)
        if mask:
            labels = [label if keep else -100 for label, keep in zip(labels, mask, strict=True)]
    real = _as_long(numbers(row, columns, "attention_mask"), ids, "attention_mask") or [1] * len(ids)
    if any(value not in (0, 1) for value in real):
        raise BadRowError("packed", f"attention_mask contains numbers other than 0 and 1; {_PACKED}")
    start, stop = (real.index(1), len(real) - real[::-1].index(1)) if 1 in real else (0, 0)
    if 0 in real[start:stop]:
        raise BadRowError("hidden tokens", "attention_mask hides tokens between others; only padding can be taken off")
    _refuse_packed(row, columns, ids, start, stop)
    return Tokens(ids[start:stop], labels[start:stop])


def _as_long(values: list[int] | None, ids: Sequence[int], name: str) -> list[int] | None:
    if values is not None and len(values) != len(ids):
        raise BadRowError("wrong length", f"{len(ids)} input_ids but {len(values)} values in {name}")
    return values


def _refuse_packed(row: Row, columns: Columns, ids: Sequence[int], start: int, stop: int) -> None:
    """Documents that share a row would see each other."""
    positions = _as_long(numbers(row, columns, "position_ids"), ids, "position_ids")
    if positions is not None and positions[start:stop] != list(range(stop - start)):
        raise BadRowError("packed", f"position_ids are not 0, 1, 2, ...; {_PACKED}")
    lengths = numbers(row, columns, "seq_lengths")
    if lengths is not None and len(lengths) > 1:
        raise BadRowError("packed", f"seq_lengths has {len(lengths)} documents; {_PACKED}")


def read_judged(row: Row, columns: Columns) -> Judged:
    """prompt and completion, or turns, with a label: whether the answer is desirable."""
    label, name = cell(row, columns, *LABEL), find(row, columns, *LABEL)
    if label is None:
        raise BadRowError("null", f"column {name!r} is null")
    wanted = judgement(label)
    if wanted is None:
        raise BadRowError("wrong label", f"column {name!r} holds {str(label)[:40]!r}, expected true or false")
    is_chat = find(row, columns, *CHAT_COLUMNS) and not find(row, columns, *COMPLETION)
    answer = read_chat(row, columns) if is_chat else read_completion(row, columns)
    return Judged(answer if isinstance(answer, Completion) else reply_only(answer), wanted)


def judgement(label: Any) -> bool | None:
    """A label as true or false, however JSON, csv (text) or pandas (1.0) write it; None if it is neither."""
    if isinstance(label, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    return bool(label) if isinstance(label, (int, float)) and label in (0, 1) else None


def reply_only(answer: Conversation) -> Conversation:
    """The conversation with loss only after its last user turn."""
    refuse_without_end(answer.messages)
    last = max((i for i, message in enumerate(answer.messages) if message.role == "user"), default=-1)
    messages = [
        message if i > last and message.role == "assistant" else replace(message, masked=True)
        for i, message in enumerate(answer.messages)
    ]
    return replace(answer, messages=messages)


def refuse_without_end(messages: Sequence[Message]) -> None:
    """Raise BadRowError unless the assistant has the last word."""
    if messages[-1].role != "assistant":
        raise BadRowError("ends with user", f"the answer ends with a {messages[-1].role} turn, expected assistant")


@dataclass(frozen=True)
class InstructReader:
    """Rows as the template's prompt and the ``output`` (``response``, ``completion``) column, or the two answers of
    preference rows."""

    template: InstructTemplate

    def __call__(self, row: Mapping[str, Any], columns: Columns) -> Completion | Pair:
        cells: dict[str, Any] = {}
        called: dict[str, str] = {}
        for column in self.template.columns:
            ours = INPUT if column == "input" else (column,)
            name = called[column] = find(row, columns, *ours) or columns.get(column, column)
            cells[name] = cell(row, columns, *ours, optional=True)
            if cells[name] is not None:
                as_text(cells[name], name, may_be_empty=True)  # a prompt needs text, not a list or an object
        needed = (called[c] for c in self.template.columns if c not in self.template.optional)
        missing = next((name for name in needed if cells[name] is None), None)
        if missing is not None:
            raise BadRowError("missing column", f"no column {missing!r}, the row has {names_of(row)}")
        prompt = self.template.format(cells, {**columns, **called})
        if find(row, columns, "chosen"):
            chosen, rejected = (_answer(row, columns, name) for name in ("chosen", "rejected"))
            return Pair(Completion(prompt, chosen), Completion(prompt, rejected))
        return Completion(prompt, _answer(row, columns, *OUTPUT, *COMPLETION))


def _answer(row: Mapping[str, Any], columns: Columns, *names: str) -> str:
    return as_text(cell(row, columns, *names), find(row, columns, *names) or names[0])
