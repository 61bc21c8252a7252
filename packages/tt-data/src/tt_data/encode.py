"""Examples to token ids and trained spans, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tt_data.examples import (
    Answer,
    BadRowError,
    Completion,
    Conversation,
    Example,
    Judged,
    Pair,
    Text,
    Tokens,
    Turns,
    answers_of,
)
from tt_data.messages import TrainOn, mask_messages, roles_of, validate_messages
from tt_data.template.chat_template import TemplateError
from tt_data.template.spans import BLANKS, Encoded, MarkedText, Span, check_unicode, join_spans
from tt_data.text.tokenizer import Tokenizer

_PROMPT_MERGES = (
    "the end of the prompt and the beginning of the completion make one token, so training and inference see "
    "different tokens; end the prompt at the end of a word"
)
Parts = tuple[Encoded, ...]  # one, or the chosen and the rejected answer


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, *, train_on: TrainOn
) -> list[Parts | BadRowError]:
    """Each example's parts, or what is wrong with it. The prompt of a compared or judged answer gives no loss."""
    if train_on == "all" and any(isinstance(example, (Pair, Judged)) for example in examples):
        train_on = "assistant"  # a data set contains no other examples beside these
    results: list[list[Encoded] | BadRowError] = []
    units: list[tuple[int, Answer]] = []
    for i, example in enumerate(examples):
        answers = answers_of(example)
        try:
            for answer in answers:
                _check(answer)
        except BadRowError as bad:
            results.append(bad)
            continue
        results.append([])
        units += [(i, answer) for answer in answers]
    for (i, _), encoded in zip(units, _encode([unit for _, unit in units], tokenizer, train_on), strict=True):
        so_far = results[i]
        if isinstance(encoded, BadRowError) and isinstance(so_far, list):
            results[i] = encoded
        elif isinstance(encoded, Encoded) and isinstance(so_far, list):
            so_far.append(encoded)
    return [result if isinstance(result, BadRowError) else tuple(result) for result in results]


def _check(unit: Answer) -> None:
    """Raise BadRowError unless the turns of ``unit`` make a conversation that ends with an answer."""
    if isinstance(unit, (Conversation, Turns)):
        try:
            if isinstance(unit, Turns):
                for message in unit.messages:
                    check_unicode(message.content)
        except ValueError as error:
            raise BadRowError("not text", str(error)) from None
        try:
            validate_messages(unit.messages)
        except ValueError as error:
            raise BadRowError("wrong roles", str(error)) from None
        if unit.messages[-1].role != "assistant":
            raise BadRowError(
                "ends with user", f"the last turn is not the assistant's (roles: {roles_of(unit.messages)})"
            )


def _encode(units: Sequence[Answer], tokenizer: Tokenizer, train_on: TrainOn) -> list[Encoded | BadRowError]:
    chats = [unit for unit in units if isinstance(unit, Conversation)]
    rows = [(mask_messages(chat.messages, train_on), chat.tools, chat.variables) for chat in chats]
    conversations = iter(tokenizer.render_conversations(rows) if rows else ())
    texts: dict[int, MarkedText] = {}  # by place in ``units``, as are the prompts
    prompts: dict[int, MarkedText] = {}
    results: list[Encoded | BadRowError] = [Encoded([])] * len(units)
    for i, unit in enumerate(units):
        if isinstance(unit, Tokens):
            results[i] = _from_tokens(unit, tokenizer.vocab_size)
            continue
        if isinstance(unit, Turns):
            turns = tokenizer.encode_turns(mask_messages(unit.formatted, train_on))
            spelt = [note for message in unit.messages for note in tokenizer.notes_of(message.content)]
            results[i] = replace(turns, notes=tuple(dict.fromkeys(spelt)))
            continue
        text = next(conversations) if isinstance(unit, Conversation) else _document(unit, train_on, tokenizer)
        if isinstance(text, TemplateError):
            results[i] = BadRowError(text.reason, str(text))
            continue
        try:
            check_unicode(text.text)
        except ValueError as error:
            results[i] = BadRowError("not text", str(error))
            continue
        texts[i] = text
        if isinstance(unit, Completion) and train_on != "all":  # what inference asks with: no blanks at the end
            prompts[i] = MarkedText(unit.prompt.rstrip(BLANKS), controls=[])
    encoded = iter(tokenizer.encode_texts([*texts.values(), *prompts.values()]))
    for i in texts:
        results[i] = next(encoded)
    asked = {i: next(encoded).ids for i in prompts}
    for i, text in texts.items():
        row = results[i]
        if isinstance(row, Encoded) and not isinstance(units[i], Conversation):
            results[i] = _with_ends(_from_prompt(row, asked.get(i, [])), text, tokenizer)
    return results


def _document(unit: Text | Completion, train_on: TrainOn, tokenizer: Tokenizer) -> MarkedText:
    text = unit.text if isinstance(unit, Text) else unit.prompt + unit.completion
    start = 0 if isinstance(unit, Text) or train_on == "all" else len(unit.prompt)
    return MarkedText(text, [(start, len(text))], controls=[], notes=tokenizer.notes_of(text))


def _from_prompt(row: Encoded, prompt: Sequence[int]) -> Encoded:
    """``row`` trained from the end of its prompt's ids, so that training and inference begin alike."""
    if row.ids[: len(prompt)] != prompt:
        return replace(row, notes=(*row.notes, _PROMPT_MERGES))
    return replace(row, trained=join_spans([(len(prompt), len(row.ids))])) if prompt else row


def _with_ends(row: Encoded, document: MarkedText, tokenizer: Tokenizer) -> Encoded:
    """The document between bos (if this model adds it) and eos, which is trained. None of them is added twice."""
    ids, spans = row.ids, row.trained
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        whole = bool(document.trained) and document.trained[0][0] == 0
        ids = [tokenizer.bos_id, *ids]
        spans = [(a + 1, b + 1) for a, b in spans]
        if whole and spans:
            spans[0] = (0, spans[0][1])
    if tokenizer.eos_id is not None and not ends_turn(ids, tokenizer):
        spans = join_spans([*spans, (len(ids), len(ids) + 1)])
        ids = [*ids, tokenizer.eos_id]
    return Encoded(ids, spans, row.notes)


def ends_turn(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a model that learns to write ``ids`` learns to stop: only white space may follow the end token."""
    for index in reversed(ids):
        if index == tokenizer.eos_id or index in tokenizer.eos_ids:
            return True
        if not tokenizer.decode([index], skip_special=False).isspace():
            return False
    return False


def _from_tokens(unit: Tokens, vocab_size: int) -> Encoded | BadRowError:
    ids = list(unit.input_ids)
    if not ids:
        return BadRowError("empty", "input_ids is empty")
    if max(ids) >= vocab_size:
        return BadRowError("unknown id", f"token id {max(ids)}, but the vocabulary has {vocab_size}")
    return Encoded(ids, spans_of([label != -100 for label in unit.labels]))


def spans_of(flags: Sequence[bool]) -> list[Span]:
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
