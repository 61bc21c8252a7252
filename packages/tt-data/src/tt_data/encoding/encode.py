"""Rows of sources to token rows, a batch at a time, with a reason for every row that is left out."""

from __future__ import annotations

import gc
import hashlib
import math
from array import array
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

from tt_data.encoding.documents import as_pair, encode_formatted, finish_document, from_tokens, to_document
from tt_data.encoding.progress import watched
from tt_data.encoding.unread import bad_rows, leave_unwritten, not_trained, untrainable
from tt_data.encoding.workers import encode_in_processes
from tt_data.examples import Answer, BadRowError, Completion, Conversation, Example, Judged, Kind, Pair, Tokens, Turns
from tt_data.messages import TrainOn, mask_messages
from tt_data.report import DUPLICATE, SAMPLE_ENDS, SAMPLE_SPREAD, Tally
from tt_data.rows.conversations import TrackedColumns
from tt_data.rows.converters import InstructReader
from tt_data.rows.schemas import OUR_READERS, Read, Settings, choose_schema, fingerprint_of, read_row
from tt_data.rows.sources import Source, quick_digest
from tt_data.template.chat_template import TemplateError
from tt_data.template.spans import BLANKS, Encoded, MarkedText, check_unicode, cut
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import TokenDataset, TokenStore

Batch = Sequence[tuple[int, Mapping[str, Any]]]  # line and row
_BATCH = 512
_NO_TEMPLATE = (
    "the prompt is text and is followed by its answer without the model's chat template; for the template, write it as "
    "turns: prompt: [{role: user, content: ...}]"
)
_MOST_BAD = 100_000  # rows at the beginning of which none can be used


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


# ---- whole sources -----------------------------------------------------------------------------------------------


def build(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings, *, fingerprint: str | None = None
) -> TokenDataset:
    """Every row of ``sources``, or the first ones that can be used up to the limit of the settings.

    Raises ValueError for an empty source, for one without a usable row, and for a bad row if the settings refuse it.
    """
    builder = _Builder(sources, tokenizer, settings, left=math.inf if settings.limit is None else settings.limit)
    tally, names = builder.tally, [source.name for source in sources]
    for number, source in enumerate(sources):
        if not builder.left:
            tally.partial = True
            break
        before = tally.seen
        builder.read(number, source)
        read = tally.seen - before
        if source.sampled_from:  # lines; among all of them as many are empty, and no rows, as in the sample
            read = round(source.sampled_from * read / (2 * SAMPLE_ENDS + SAMPLE_SPREAD))
        tally.sampled_from += read
    if not any(source.sampled_from for source in sources):
        tally.sampled_from = 0
    tally.partial = tally.partial or bool(tally.sampled_from)
    kept = len(builder.truncated)
    if tally.dropped and (not kept or settings.on_bad_row == "error"):
        raise bad_rows(names, kept, tally, settings)
    if fingerprint is None:
        quick = settings.limit is not None or settings.sample  # no file is read whole
        content = [quick_digest(found.path) if quick and found.path else found.digest() for found in sources]
        some = [str(settings.limit or tally.sampled_from)] if quick else []
        fingerprint = fingerprint_of([*some, *content], tokenizer, settings)
    return TokenDataset(
        tokenizer, schema="+".join(builder.schemas), stores=builder.stores, names=names, places=builder.places,
        truncated=builder.truncated, desirable=builder.desirable if builder.kind == "judged" else None, tally=tally,
        fingerprint=fingerprint,
    )  # fmt: skip


@dataclass
class _Builder:
    """The rows that have been kept so far, and what has been counted."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    settings: Settings
    left: float  # rows that are still wanted
    tally: Tally = field(default_factory=Tally)
    digests: dict[int, set[bytes]] = field(default_factory=dict)  # of a source's first, second, ... time
    schemas: dict[str, str] = field(default_factory=dict)  # an ordered set: schema -> the first source of its kind
    kind: Kind | None = None
    stores: list[TokenStore] = field(default_factory=lambda: [TokenStore()])
    places: array[int] = field(default_factory=lambda: array("q"))
    truncated: array[int] = field(default_factory=lambda: array("b"))
    desirable: array[int] = field(default_factory=lambda: array("b"))

    def read(self, number: int, source: Source) -> None:
        rows, settings, name = source.rows(), self.settings, source.name
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{name} has 0 rows; give a file with rows")
        read, schema = settings.read, settings.read_as
        if read is None:
            found = choose_schema(first[1], self.tokenizer, settings, where=f"{name}:{first[0]}")
            read, schema = found.read, found.name
        self.schemas.setdefault(schema, name)
        digests = self.digests.setdefault([earlier.name for earlier in self.sources[:number]].count(name), set())
        encode = partial(encode_rows, name, tally=self.tally, read=read, tokenizer=self.tokenizer, settings=settings)
        every = chain([first], rows)
        batches = iter(lambda: list(islice(every, int(min(_BATCH, self.left)))), [])
        processes = bool(settings.num_workers or settings.spare_workers) and settings.limit is None
        work = encode_in_processes(encode, batches, name, self.tally, settings) if processes else map(encode, batches)
        with closing(work) if isinstance(work, Generator) else nullcontext():
            for kept in work if settings.progress is None else watched(work, self.tally, self.sources, settings):
                for row in kept:
                    self.keep(number, row, digests)
                if self.tally.seen > _MOST_BAD and not self.truncated:  # an endless source has no end to wait for
                    raise bad_rows([each.name for each in self.sources], 0, self.tally, settings)
                if not self.left:
                    self.tally.partial = _has_more(rows)
                    break

    def keep(self, number: int, row: TokenRow, digests: set[bytes]) -> None:
        if self.settings.drop_duplicates:
            if row.digest in digests:
                where = f"{self.sources[number].name}:{row.line}"
                self.tally.drop(where, BadRowError(DUPLICATE, "the same as an earlier row"))
                return
            digests.add(row.digest)
        self.tally.truncated += row.truncated
        self.tally.no_end += row.no_end
        if self.kind is None:
            self.kind = row.kind
            self.stores = [TokenStore() for _ in row.parts]
        if row.kind != self.kind:
            where = f"{self.sources[number].name}:{row.line}"
            raise ValueError(f"{where}: {row.kind} rows cannot be mixed with the {self.kind} rows before them")
        for store, part in zip(self.stores, row.parts, strict=True):
            store.append(part)
        self.left -= 1
        self.places.extend((number, row.line))
        self.truncated.append(row.truncated)
        if row.kind == "judged":
            self.desirable.append(row.desirable)


def _has_more(rows: Iterator[Any]) -> bool:
    try:
        return next(rows, None) is not None
    except ValueError:  # what cannot be read is something
        return True


# ---- a batch of rows ---------------------------------------------------------------------------------------------


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for circles of objects: a batch has none, and the search takes a quarter of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        (gc.enable if collects else gc.disable)()


@_uncollected()
def encode_rows(
    name: str, batch: Batch, *, tally: Tally, read: Read, tokenizer: Tokenizer, settings: Settings
) -> list[TokenRow]:
    """The rows of ``batch`` that can be learned from; ``tally`` counts all. Raises ValueError if a setting is at fault,
    not a row. The prompt of a compared or judged answer gives no loss."""
    columns, train_on = settings.columns, settings.train_on
    if read in OUR_READERS or isinstance(read, InstructReader):
        columns = TrackedColumns(columns)
    examples: list[tuple[str, int, Example, Sequence[Answer]]] = []
    for line, row in batch:
        tally.seen += 1
        where = f"{name}:{line}"
        try:
            examples.append((where, line, *read_row(where, row, columns, read, tally)))
        except BadRowError as bad:
            tally.drop(where, bad)
    if train_on == "all" and any(isinstance(example, (Pair, Judged)) for *_, example, _ in examples):
        train_on = "assistant"  # a data set contains no other examples beside these
    answers = [(where, answer) for where, *_, several in examples for answer in several]
    encoded = iter(encode_answers([answer for _, answer in answers], tokenizer, train_on))
    forms = {"chat" if isinstance(answer, Conversation) else "text" for _, answer in answers}
    tally.forms |= forms
    for note in tokenizer.template_notes if "chat" in forms else ():
        tally.note(note)
    turns = [(where, answer) for where, answer in answers if isinstance(answer, (Conversation, Turns))]
    if any(message.extra for _, answer in turns for message in answer.messages):
        leave_unwritten(turns, tokenizer, tally)
    kept: list[TokenRow] = []
    for where, line, example, several in examples:
        parts = [next(encoded) for _ in several]
        try:
            kept.append(_finish(line, example, parts, tokenizer, settings, tally))
        except BadRowError as bad:
            tally.drop(where, bad)
            continue
        chats = [answer for answer in several if isinstance(answer, (Conversation, Turns))]
        noted = [note for answer in chats if isinstance(answer, Conversation) for note in answer.notes]
        if any(message.asked for answer in chats for message in answer.messages):
            noted += not_trained(chats, settings.train_on)
        noted += [note for part in kept[-1].parts for note in part.notes]
        if tokenizer.templates and not isinstance(read, InstructReader):
            noted += [_NO_TEMPLATE for answer in several if isinstance(answer, Completion) and answer.prompt]
        for note in dict.fromkeys(noted):
            tally.note(note, where)
    return kept


def encode_answers(answers: Sequence[Answer], tokenizer: Tokenizer, train_on: TrainOn) -> list[Encoded | BadRowError]:
    """The ids of each answer and what of them is trained, or what is wrong with it."""
    chats = [answer for answer in answers if isinstance(answer, Conversation)]
    rows = [(mask_messages(chat.messages, train_on), chat.tools, chat.variables) for chat in chats]
    conversations = iter(tokenizer.render_conversations(rows) if rows else ())
    texts: dict[int, MarkedText] = {}  # by place in ``answers``, as are the prompts
    prompts: dict[int, MarkedText] = {}
    results: list[Encoded | BadRowError] = [Encoded([])] * len(answers)
    for i, answer in enumerate(answers):
        if isinstance(answer, Tokens):
            results[i] = from_tokens(answer, tokenizer.vocab_size)
            continue
        try:
            if isinstance(answer, Turns):
                results[i] = encode_formatted(answer, tokenizer, train_on)
                continue
            if isinstance(answer, Conversation):
                text = next(conversations)
            else:
                text = to_document(answer, train_on, tokenizer)
            if isinstance(text, TemplateError):
                results[i] = BadRowError(text.reason, str(text))
                continue
            if not text.text.isascii():
                check_unicode(text.text)
        except ValueError as error:
            results[i] = BadRowError("not text", str(error))
            continue
        texts[i] = text
        if isinstance(answer, Completion) and train_on != "all":  # what inference asks with: no blanks at the end
            prompts[i] = MarkedText(answer.prompt.rstrip(BLANKS), controls=[])
    encoded = tokenizer.encode_texts([*texts.values(), *prompts.values()])
    asked = dict(zip(prompts, encoded[len(texts) :], strict=True))
    for (i, text), row in zip(texts.items(), encoded[: len(texts)], strict=True):
        is_chat = isinstance(answers[i], Conversation)
        results[i] = row if is_chat else finish_document(row, asked[i].ids if i in asked else [], text, tokenizer)
    return results


def _finish(
    line: int, example: Example, parts: Sequence[Encoded | BadRowError], tokenizer: Tokenizer, settings: Settings,
    tally: Tally,
) -> TokenRow:  # fmt: skip
    """The row that is kept. Raises BadRowError if nothing can be learned from it."""
    sides: list[Encoded] = []
    for part in parts:
        if isinstance(part, BadRowError):
            raise part
        sides.append(part)
    if isinstance(example, Pair):
        sides = [*as_pair(*sides)]
    limit = settings.max_seq_len
    truncated = limit is not None and any(len(side.ids) > limit for side in sides)
    kept = [cut(side, limit) for side in sides] if truncated else sides
    if not all(any(end > max(start, 1) for start, end in side.trained) for side in kept):
        raise untrainable(sides, limit, tally)
    if len(kept) == 2 and kept[0].ids == kept[1].ids:
        raise BadRowError("equal answers", f"chosen and rejected differ only behind max_seq_len {limit}")
    no_end = any(not tokenizer.ends_turn(side.ids[a:b]) for side in sides for a, b in side.trained)
    kind: Kind = "single" if not isinstance(example, (Pair, Judged)) else example.kind
    desirable = isinstance(example, Judged) and example.desirable
    digest = digest_of(sides, desirable) if settings.drop_duplicates else b""
    return TokenRow(line, kind, kept, truncated, no_end, desirable, digest)


def digest_of(parts: Sequence[Encoded], desirable: bool) -> bytes:
    """A digest of the contents of a row."""
    total = hashlib.blake2b(bytes([desirable]), digest_size=12)
    for part in parts:
        total.update(array("i", part.ids).tobytes() + repr(part.trained).encode())
    return total.digest()
