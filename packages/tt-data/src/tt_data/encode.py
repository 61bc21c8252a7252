"""Examples to token ids and trained spans, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tt_data.messages import TrainOn, mask_messages, roles_of, validate_messages
from tt_data.rows.examples import BadRowError, Completion, Conversation, Example, Judged, Pair, Text, Tokens, Turns
from tt_data.template.chat_template import TemplateError
from tt_data.template.spans import BLANKS, Encoded, Rendered, Span, check_unicode, join_spans
from tt_data.text.tokenizer import Tokenizer

_PROMPT_MERGES = (
    "the end of the prompt and the beginning of the completion make one token, so that what is trained is not what "
    "inference asks for; end the prompt where a word ends"
)
Unit = Conversation | Turns | Completion | Text | Tokens
Parts = tuple[Encoded, ...]  # one, or the chosen and the rejected answer


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, *, train_on: TrainOn
) -> list[Parts | BadRowError]:
    """Each example's parts, or what is wrong with it. The prompt of a compared or judged answer gives no loss."""
    if train_on == "all" and any(isinstance(example, (Pair, Judged)) for example in examples):
        train_on = "assistant"  # a data set holds no other examples beside these
    results: list[list[Encoded] | BadRowError] = [[] for _ in examples]
    units: list[tuple[int, Unit]] = []
    for i, example in enumerate(examples):
        try:
            units += [(i, _checked(unit)) for unit in _units(example)]
        except BadRowError as bad:
            results[i] = bad
    units = [(i, unit) for i, unit in units if not isinstance(results[i], BadRowError)]
    for (i, _), encoded in zip(units, _encode_units([u for _, u in units], tokenizer, train_on), strict=True):
        so_far = results[i]
        if isinstance(so_far, list):
            if isinstance(encoded, BadRowError):
                results[i] = encoded
            else:
                so_far.append(encoded)
    return [result if isinstance(result, BadRowError) else tuple(result) for result in results]


def _units(example: Example) -> list[Unit]:
    if isinstance(example, Pair):
        return [example.chosen, example.rejected]
    return [example.answer if isinstance(example, Judged) else example]


def _checked(unit: Unit) -> Unit:
    """``unit``, when its turns make a conversation that ends with an answer. Raises BadRowError."""
    if isinstance(unit, Turns):
        for message in unit.messages:
            _refuse_half_pairs(message.content)
    if isinstance(unit, (Conversation, Turns)):
        try:
            validate_messages(unit.messages)
        except ValueError as error:
            raise BadRowError("wrong roles", str(error)) from None
        if unit.messages[-1].role != "assistant":
            raise BadRowError(
                "ends with user", f"the last turn is not the assistant's (roles: {roles_of(unit.messages)})"
            )
    return unit


def _encode_units(units: Sequence[Unit], tokenizer: Tokenizer, train_on: TrainOn) -> list[Encoded | BadRowError]:
    rendered = _render_units(units, tokenizer, train_on)
    encoded = iter(tokenizer.encode_rendered([row for row in rendered if isinstance(row, Rendered)]))
    asks = [train_on != "all" and isinstance(row, Rendered) for row in rendered]
    prompts = tokenizer.encode_rendered(
        [_prompt_of(u) if a else Rendered("") for u, a in zip(units, asks, strict=True)]
    )
    results: list[Encoded | BadRowError] = []
    for unit, row, prompt in zip(units, rendered, prompts, strict=True):
        if isinstance(row, BadRowError):
            results.append(row)
        elif isinstance(unit, Tokens):
            results.append(_from_tokens(unit, tokenizer.vocab_size))
        elif isinstance(unit, Turns):
            turns = tokenizer.encode_turns(mask_messages(unit.formatted, train_on))
            spelt = [note for message in unit.messages for note in tokenizer.notes_of(message.content)]
            results.append(replace(turns, notes=tuple(dict.fromkeys(spelt))))
        elif isinstance(unit, Conversation):
            results.append(next(encoded))
        else:
            assert row is not None
            results.append(_with_ends(_from_prompt(next(encoded), prompt.ids), row, tokenizer))
    return results


def _render_units(
    units: Sequence[Unit], tokenizer: Tokenizer, train_on: TrainOn
) -> list[Rendered | BadRowError | None]:
    """The text of each unit, what is wrong with it, or None for one that is encoded otherwise."""
    chats = [unit for unit in units if isinstance(unit, Conversation)]
    rows = [(mask_messages(chat.messages, train_on), chat.tools, chat.variables) for chat in chats]
    conversations = iter(tokenizer.render_rows(rows) if rows else ())
    results: list[Rendered | BadRowError | None] = []
    for unit in units:
        if isinstance(unit, (Tokens, Turns)):
            results.append(None)
            continue
        row = next(conversations) if isinstance(unit, Conversation) else _document(unit, train_on, tokenizer)
        if isinstance(row, TemplateError):
            results.append(BadRowError(row.reason, str(row)))
        else:
            try:
                _refuse_half_pairs(row.text)
                results.append(row)
            except BadRowError as bad:
                results.append(bad)
    return results


def _refuse_half_pairs(text: str) -> None:
    try:
        check_unicode(text)
    except ValueError as error:
        raise BadRowError("not text", str(error)) from None


def _document(unit: Text | Completion, train_on: TrainOn, tokenizer: Tokenizer) -> Rendered:
    text = unit.text if isinstance(unit, Text) else unit.prompt + unit.completion
    start = 0 if isinstance(unit, Text) or train_on == "all" else len(unit.prompt)
    return Rendered(text, [(start, len(text))], controls=[], notes=tokenizer.notes_of(text))


def _prompt_of(unit: Unit) -> Rendered:
    """What inference asks: the prompt without the blanks at its end, which make one token with the word behind them."""
    return Rendered(unit.prompt.rstrip(BLANKS) if isinstance(unit, Completion) else "", controls=[])


def _from_prompt(row: Encoded, prompt: Sequence[int]) -> Encoded:
    """``row`` trained from where the ids of its prompt end, so that it is trained as it is asked."""
    if row.ids[: len(prompt)] != prompt:
        return replace(row, notes=(*row.notes, _PROMPT_MERGES))
    return replace(row, trained=join_spans([(len(prompt), len(row.ids))])) if prompt else row


def _with_ends(row: Encoded, document: Rendered, tokenizer: Tokenizer) -> Encoded:
    """The document between bos (if this model has it) and eos, which is trained; neither twice, if it holds them."""
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
    """Whether a model that learned to write ``ids`` has learned to stop: white space may follow the end token."""
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
