"""Answers that are plain text, formatted turns or ids, as token rows; and pairs of answers.

A file apart from ``encode``: conversations never need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tt_data.examples import BadRowError, Completion, Text, Tokens, Turns
from tt_data.messages import TrainOn, mask_messages
from tt_data.template.spans import Encoded, MarkedText, Span, check_unicode, join_spans
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import IGNORE_INDEX

_PROMPT_MERGES = (
    "the end of the prompt and the beginning of the completion make one token, so training and inference see "
    "different tokens; end the prompt at the end of a word"
)


def to_document(unit: Text | Completion, train_on: TrainOn, tokenizer: Tokenizer) -> MarkedText:
    """A text, or a prompt and its completion, with the characters that are trained."""
    text = unit.text if isinstance(unit, Text) else unit.prompt + unit.completion
    start = 0 if isinstance(unit, Text) or train_on == "all" else len(unit.prompt)
    return MarkedText(text, [(start, len(text))], controls=[], notes=tokenizer.notes_of(text))


def finish_document(row: Encoded, prompt: Sequence[int], document: MarkedText, tokenizer: Tokenizer) -> Encoded:
    """``row`` trained from the end of the ids of its ``prompt``, so that training and inference begin alike; between
    bos (if this model adds it) and eos, which is trained. Neither is added twice."""
    ids, spans, notes = row.ids, row.trained, row.notes
    if ids[: len(prompt)] != prompt:
        notes = (*notes, _PROMPT_MERGES)
    elif prompt:
        spans = join_spans([(len(prompt), len(ids))])
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        whole = bool(document.trained) and document.trained[0][0] == 0
        ids = [tokenizer.bos_id, *ids]
        spans = [(a + 1, b + 1) for a, b in spans]
        if whole and spans:
            spans[0] = (0, spans[0][1])
    if tokenizer.eos_id is not None and not tokenizer.ends_turn(ids):
        spans = join_spans([*spans, (len(ids), len(ids) + 1)])
        ids = [*ids, tokenizer.eos_id]
    return Encoded(ids, spans, notes)


def encode_formatted(turns: Turns, tokenizer: Tokenizer, train_on: TrainOn) -> Encoded:
    """Turns with the text of a chat format, one by one. Raises ValueError for text that is not Unicode."""
    for message in turns.messages:
        check_unicode(message.content)
    notes = dict.fromkeys(note for message in turns.messages for note in tokenizer.notes_of(message.content))
    return replace(tokenizer.encode_turns(mask_messages(turns.formatted, train_on)), notes=tuple(notes))


def from_tokens(unit: Tokens, vocab_size: int) -> Encoded | BadRowError:
    """Ids of another program, of which those with a label are trained."""
    ids = list(unit.input_ids)
    if not ids:
        return BadRowError("empty", "input_ids is empty")
    if max(ids) >= vocab_size:
        return BadRowError("unknown id", f"token id {max(ids)}, but the vocabulary has {vocab_size}")
    return Encoded(ids, _runs([label != IGNORE_INDEX for label in unit.labels]))


def _runs(flags: Sequence[bool]) -> list[Span]:
    """The runs of True."""
    spans: list[Span] = []
    start = None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            spans.append((start, i))
            start = None
    return spans


def as_pair(chosen: Encoded, rejected: Encoded) -> tuple[Encoded, Encoded]:
    """Both sides with the same masked ids. Raises BadRowError if the prompts differ.

    Tokens may contain the end of the prompt and the beginning of just one answer. Then both answers begin before them.
    """
    if chosen.ids == rejected.ids:
        raise BadRowError(
            "equal answers", "chosen and rejected become the same text: the chat template drops what differs"
        )
    if len(chosen.trained) == len(rejected.trained) == 1:
        start = min(chosen.trained[0][0], rejected.trained[0][0])
        if _PROMPT_MERGES in (*chosen.notes, *rejected.notes):  # of one prompt, which is text
            start = next((i for i in range(start) if chosen.ids[i] != rejected.ids[i]), start)
        if chosen.ids[:start] == rejected.ids[:start]:
            chosen = replace(chosen, trained=[(start, chosen.trained[0][1])])
            rejected = replace(rejected, trained=[(start, rejected.trained[0][1])])
    if _masked_ids(chosen) != _masked_ids(rejected):
        raise BadRowError(
            "not a pair", "the masked parts of chosen and rejected differ, expected one prompt and two answers"
        )
    return chosen, rejected


def _masked_ids(part: Encoded) -> list[int]:
    ends = [0, *(place for span in part.trained for place in span), len(part.ids)]
    return [i for start, end in zip(ends[::2], ends[1::2], strict=True) for i in part.ids[start:end]]
