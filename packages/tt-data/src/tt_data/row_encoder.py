"""Rows of one source to token rows, a batch at a time, with a reason for every row that is left out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tt_data.dataset import IGNORE_INDEX, labels_of
from tt_data.encode import Parts, encode_examples, ends_turn
from tt_data.examples import (
    BadRowError,
    Conversation,
    Example,
    Judged,
    Kind,
    Pair,
    TrackedRow,
    Turns,
    answers_of,
    is_empty,
    kind_of,
    mistake_in,
)
from tt_data.messages import Message, TrainOn, mask_messages
from tt_data.report import Tally
from tt_data.rows.schemas import Read, hint_for_unread, tracks
from tt_data.rows.settings import Settings
from tt_data.template.spans import Encoded, cut
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import said

Batch = Sequence[tuple[int, Mapping[str, Any]]]  # line and row
_ALL = "train_on=all trains all turns but those with weight: 0"
_TRAINED = {
    "assistant": f"train_on=assistant trains the assistant's turns; {_ALL}",
    "last": f"train_on=last trains the last answer; {_ALL}",
    "all": "the prompts of compared and judged answers are not",
}
_SOUGHT = {"content", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "thinking"}


@dataclass(slots=True)
class TokenRow:
    """One row that is kept: one part, or the chosen and the rejected one."""

    line: int
    kind: Kind
    parts: Sequence[Encoded]
    truncated: bool = False
    no_end: bool = False
    desirable: bool = False
    digest: bytes = b""  # of the row before it was cut, to find duplicates


def encode_rows(
    name: str, batch: Batch, *, read: Read, tokenizer: Tokenizer, settings: Settings
) -> tuple[list[TokenRow], Tally]:
    """The rows of ``batch`` that can be learned from, and what was counted of all.

    Raises ValueError if a setting is at fault, not a row.
    """
    tally = Tally()
    examples: list[tuple[str, int, Example]] = []
    tracked = tracks(read)
    for line, row in batch:
        tally.seen += 1
        where = f"{name}:{line}"
        try:
            examples.append((where, line, _read(where, TrackedRow(row) if tracked else row, read, settings, tally)))
        except BadRowError as bad:
            tally.drop(where, bad)
    answers = [(where, answer) for where, _, example in examples for answer in answers_of(example)]
    forms = {"chat" if isinstance(answer, Conversation) else "text" for _, answer in answers}
    tally.forms |= forms
    for note in tokenizer.template_notes if "chat" in forms else ():
        tally.note(note)
    turns = [(where, answer) for where, answer in answers if isinstance(answer, (Conversation, Turns))]
    if any(message.extra for _, answer in turns for message in answer.messages):
        _leave_unwritten(turns, tokenizer, tally)
    encoded = encode_examples([example for *_, example in examples], tokenizer, train_on=settings.train_on)
    kept: list[TokenRow] = []
    for (where, line, example), parts in zip(examples, encoded, strict=True):
        try:
            kept.append(_finish(line, example, parts, tokenizer, settings, tally))
        except BadRowError as bad:
            tally.drop(where, bad)
            continue
        chats = [answer for answer in answers_of(example) if isinstance(answer, (Conversation, Turns))]
        noted = [note for answer in chats if isinstance(answer, Conversation) for note in answer.notes]
        if any(message.asked for answer in chats for message in answer.messages):
            noted += _not_trained(chats, settings.train_on)
        noted += [note for part in kept[-1].parts for note in part.notes]
        for note in dict.fromkeys(noted):
            tally.note(note, where)
    return kept, tally


def _read(where: str, row: Mapping[str, Any], read: Read, settings: Settings, tally: Tally) -> Example:
    """What ``read`` makes of a row. Raises BadRowError, and ValueError with the place of a mistake in ``read``."""
    try:
        example = read(row, settings.columns)
        mistake = mistake_in(example)
    except BadRowError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {said(error, 500)}"
        raise ValueError(f"{where}: the converter of these rows failed: {what}") from error
    if mistake:
        raise ValueError(f"{where}: the converter of these rows is wrong: {mistake}")
    for column in row.unread() if isinstance(row, TrackedRow) else ():
        if column not in tally.unread:
            tally.hints[column] = hint_for_unread(column, row, settings.columns, read)
        tally.leave(column, where)
    return example


def _leave_unwritten(
    turns: Sequence[tuple[str, Conversation | Turns]], tokenizer: Tokenizer, tally: Tally
) -> None:  # fmt: skip
    """Count the keys of messages without which the text is the same. Rendering itself finds those of ``_SOUGHT``."""
    sources = tokenizer.templates.values()
    without: list[tuple[str, str]] = []
    rows: list[tuple[list[Message], Any, Any]] = []
    for where, part in turns:
        keys = {key for message in part.messages for key, value in message.extra.items() if not is_empty(value)}
        for key in sorted(keys if isinstance(part, Turns) else keys - _SOUGHT):
            if isinstance(part, Turns) or not any(key in source for source in sources):
                tally.leave(f"messages.{key}", where)
                continue
            without.append((where, key))
            plain = [replace(message, masked=True) for message in part.messages]
            rows.append((plain, part.tools, part.variables))
            rows.append(([_without(message, key) for message in plain], part.tools, part.variables))
    texts = [getattr(row, "text", None) for row in tokenizer.render_conversations(rows)] if rows else []
    for (where, key), one, other in zip(without, texts[::2], texts[1::2], strict=True):
        if one == other and one is not None:  # None: the template fails, and the row's own error says so
            tally.leave(f"messages.{key}", where)


def _without(message: Message, key: str) -> Message:
    return replace(message, extra={name: value for name, value in message.extra.items() if name != key})


def _finish(
    line: int, example: Example, parts: Parts | BadRowError, tokenizer: Tokenizer, settings: Settings, tally: Tally
) -> TokenRow:
    """The row that is kept. Raises BadRowError if nothing can be learned from it."""
    if isinstance(parts, BadRowError):
        raise parts
    if isinstance(example, Pair):
        parts = _as_pair(*parts)
    limit = settings.max_seq_len
    if not all(map(is_trainable, parts)):
        why = [note for part in parts for note in part.notes] or ["none of its answers is trained"]
        raise BadRowError("no trainable token", f"no trainable token: {'; '.join(dict.fromkeys(why))}")
    truncated = limit is not None and any(len(part.ids) > limit for part in parts)
    kept = [cut(part, limit) for part in parts] if truncated else parts
    if not all(map(is_trainable, kept)):
        prompt = max(part.trained[0][0] if part.trained else len(part.ids) for part in parts)
        tally.longest_prompt = max(tally.longest_prompt, prompt)
        raise BadRowError("no trainable token", f"no trainable token at max_seq_len {limit} (its prompt has {prompt})")
    if len(kept) == 2 and kept[0].ids == kept[1].ids:
        raise BadRowError("equal answers", f"chosen and rejected differ only behind max_seq_len {limit}")
    no_end = any(not ends_turn(part.ids[a:b], tokenizer) for part in parts for a, b in part.trained)
    desirable = isinstance(example, Judged) and example.desirable
    digest = digest_of(parts, desirable) if settings.drop_duplicates else b""
    return TokenRow(line, kind_of(example), kept, truncated, no_end, desirable, digest)


def _not_trained(chats: Sequence[Conversation | Turns], train_on: TrainOn) -> list[str]:
    """A note if a message says itself that it is trained, and ``train_on`` leaves it out."""
    for chat in chats:
        masked = mask_messages(chat.messages, train_on)
        if any(old.asked and new.masked for old, new in zip(chat.messages, masked, strict=True)):
            return [f"some messages with weight: 1, train: true or their like are not trained: {_TRAINED[train_on]}"]
    return []


def _as_pair(chosen: Encoded, rejected: Encoded) -> Parts:
    """Both sides with the same masked ids. Raises BadRowError if the prompts differ.

    A token may contain the end of the prompt and the beginning of just one answer. Then both answers begin before it.
    """
    if chosen.ids == rejected.ids:
        raise BadRowError(
            "equal answers", "chosen and rejected become the same text: the chat template drops what differs"
        )
    if len(chosen.trained) == len(rejected.trained) == 1:
        start = min(chosen.trained[0][0], rejected.trained[0][0])
        if chosen.ids[:start] == rejected.ids[:start]:
            chosen = replace(chosen, trained=[(start, chosen.trained[0][1])])
            rejected = replace(rejected, trained=[(start, rejected.trained[0][1])])
    if _masked_ids(chosen) != _masked_ids(rejected):
        raise BadRowError(
            "not a pair", "the masked parts of chosen and rejected differ, expected one prompt and two answers"
        )
    return chosen, rejected


def _masked_ids(part: Encoded) -> list[int]:
    return [i for i, label in zip(part.ids, labels_of(part.ids, part.trained), strict=True) if label == IGNORE_INDEX]


def digest_of(parts: Parts, desirable: bool) -> bytes:
    """A digest of the contents of a row."""
    total = hashlib.blake2b(bytes([desirable]), digest_size=12)
    for part in parts:
        total.update(array("i", part.ids).tobytes() + repr(part.trained).encode())
    return total.digest()


def is_trainable(row: Encoded) -> bool:
    """Whether a token after the first is trained (there is nothing to predict the first from)."""
    return any(end > max(start, 1) for start, end in row.trained)
