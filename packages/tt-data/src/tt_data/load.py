"""``load_dataset``: from a source of rows to token rows, with every row accounted for."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from tt_data.chat_formats import CHAT_TEMPLATES, resolve_template
from tt_data.converters import Columns, Schema, detect_schema
from tt_data.dataset import Tally, TokenDataset, cut, is_trainable
from tt_data.encode import AMBIGUOUS, Parts, TrainOn, check_train_on, encode_examples
from tt_data.examples import BadRowError, Completion, Example, Judged, Pair
from tt_data.instruct_templates import INSTRUCT_TEMPLATES, InstructTemplate
from tt_data.locate import Source, open_sources
from tt_data.packing import PackedDataset
from tt_data.rendered import Encoded
from tt_data.store import TokenStore
from tt_data.tokenizer import Tokenizer

_BATCH = 512
OnBadRow = Literal["drop", "error"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the token rows, next to the source and the tokenizer."""

    columns: Mapping[str, str]
    train_on: TrainOn
    max_seq_len: int | None
    template: str | None
    on_bad_row: OnBadRow
    drop_duplicates: bool = True

    def __post_init__(self) -> None:
        check_train_on(self.train_on)
        if self.on_bad_row not in ("drop", "error"):
            raise ValueError(f"on_bad_row must be drop or error, got {self.on_bad_row!r}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")


def load_dataset(
    source: Any, tokenizer: Tokenizer, *, columns: Mapping[str, str] | None = None, train_on: TrainOn = "assistant",
    max_seq_len: int | None = None, packing: bool = False, split: str | None = None, seed: int = 0,
    template: str | None = None, on_bad_row: OnBadRow = "drop", drop_duplicates: bool = True,
) -> TokenDataset | PackedDataset:  # fmt: skip
    """Token rows of a file, a list of files, a directory, a hub id, or rows in memory.

    ``columns``: our column name to theirs, where they differ. ``train_on``: which turns give loss. ``template``: a
    built-in chat or instruct template instead of the model's own. ``on_bad_row``: count and drop, or refuse.
    ``packing``: whole documents together in rows of ``max_seq_len`` (``seed`` decides which).
    Raises ValueError or FileNotFoundError, naming the file and line.
    """
    settings = Settings(
        columns=dict(columns or {}), train_on=train_on, max_seq_len=max_seq_len, template=template,
        on_bad_row=on_bad_row, drop_duplicates=drop_duplicates,
    )  # fmt: skip
    tokenizer = choose_template(tokenizer, template)
    if packing and max_seq_len is None:
        raise ValueError("packing needs max_seq_len: the length of a packed row")
    dataset = _Builder(open_sources(source, split), tokenizer, settings).build()
    return PackedDataset(dataset, max_seq_len=max_seq_len, seed=seed) if packing and max_seq_len else dataset


def choose_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """``tokenizer`` with the chat template of that name; instruct templates change rows, not the tokenizer."""
    if template is None or template in INSTRUCT_TEMPLATES:
        return tokenizer
    try:
        return tokenizer.with_template(*resolve_template(template))
    except ValueError as error:
        raise ValueError(str(error).replace(" or a .jinja", f", {', '.join(INSTRUCT_TEMPLATES)} or a .jinja")) from None


def choose_reader(
    schema: Schema, tokenizer: Tokenizer, settings: Settings
) -> Callable[[Mapping[str, Any], Columns], Example]:
    """How rows of ``schema`` are read: by a prompt template where one is named or the model has no chat template."""
    template = INSTRUCT_TEMPLATES.get(settings.template or "")
    if template is None and schema.name == "alpaca" and not tokenizer.has_chat_template:
        template = INSTRUCT_TEMPLATES["alpaca"]
    return schema.read if template is None else instruct_reader(template)


def instruct_reader(template: InstructTemplate) -> Callable[[Mapping[str, Any], Columns], Completion]:
    """Rows as the template's prompt and the ``output`` (``response``, ``completion``) column."""

    def read(row: Mapping[str, Any], columns: Columns) -> Completion:
        try:
            prompt = template.format(row, columns)
        except ValueError as error:
            raise BadRowError("missing column", str(error)) from None
        names = [columns.get(name, name) for name in ("output", "response", "completion")]
        answer = next((row[name] for name in names if name in row), None)
        if answer is None:
            raise BadRowError(
                "null" if any(name in row for name in names) else "missing column", f"no {names[0]!r} in the row"
            )
        if not str(answer).strip():
            raise BadRowError("empty", f"column {names[0]!r} is empty")
        return Completion(prompt, str(answer))

    return read


class _Builder:
    """Reads sources batch by batch into stores."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, settings: Settings) -> None:
        self.sources, self.tokenizer, self.settings = sources, tokenizer, settings
        self.tally = Tally()
        self.schemas: list[str] = []
        self.kinds: set[str] = set()
        self.stores = [TokenStore()]
        self.places, self.desirable = array("q"), array("b")
        self.hashes: set[bytes] = set()

    def build(self) -> TokenDataset:
        digest = hashlib.sha256()
        for number, source in enumerate(self.sources):
            self._read(number, source)
            digest.update(source.digest().encode())
        self._refuse_if_bad()
        digest.update(self.tokenizer.fingerprint.encode())
        digest.update(json.dumps(vars(self.settings), sort_keys=True, default=str).encode())
        sides = ("chosen_", "rejected_") if len(self.stores) == 2 else ("",)
        return TokenDataset(
            self.tokenizer, schema="+".join(self.schemas), sides=sides, stores=self.stores,
            names=[source.name for source in self.sources], places=self.places, tally=self.tally,
            fingerprint=digest.hexdigest(), desirable=self.desirable if "judged" in self.kinds else None,
        )  # fmt: skip

    def _read(self, number: int, source: Source) -> None:
        rows = source.rows()
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{source.name} has 0 rows")
        schema = self._schema(first[1], f"{source.name}:{first[0]}")
        if schema.name not in self.schemas:
            self.schemas.append(schema.name)
        read = choose_reader(schema, self.tokenizer, self.settings)
        if schema.name in ("openai", "sharegpt") and not self.tokenizer.has_chat_template:
            raise ValueError(
                f"{source.name}: {schema.name} rows need a chat template and this model has none; "
                f"name one with template=... ({', '.join(CHAT_TEMPLATES)})"
            )
        for batch in batched(_chain(first, rows), _BATCH):
            self._add(number, source, batch, read)

    def _schema(self, row: Mapping[str, Any], where: str) -> Schema:
        if self.settings.template in INSTRUCT_TEMPLATES:
            return Schema(f"instruct:{self.settings.template}", (), lambda row, columns: Completion("", ""))
        return detect_schema(row, self.settings.columns, where=where)

    def _add(self, number: int, source: Source, batch: Sequence[tuple[int, Any]], read: Any) -> None:
        examples: list[tuple[int, Example]] = []
        for line, row in batch:
            self.tally.seen += 1
            try:
                examples.append((line, read(row, self.settings.columns)))
            except BadRowError as bad:
                self.tally.drop(f"{source.name}:{line}", bad)
        encoded = encode_examples([e for _, e in examples], self.tokenizer, train_on=self.settings.train_on)
        for (line, example), parts in zip(examples, encoded, strict=True):
            try:
                self._keep(number, line, example, parts)
            except BadRowError as bad:
                self.tally.drop(f"{source.name}:{line}", bad)

    def _keep(self, number: int, line: int, example: Example, parts: Parts | BadRowError) -> None:
        if isinstance(parts, BadRowError):
            if parts.reason == AMBIGUOUS:
                raise ValueError(f"{self.sources[number].name}:{line}: {parts}")
            raise parts
        self._refuse_duplicate(parts)
        kept = self._cut(parts)
        kind = "pair" if isinstance(example, Pair) else "judged" if isinstance(example, Judged) else "single"
        self.kinds.add(kind)
        if len(self.kinds) > 1:
            raise ValueError(
                f"{self.sources[number].name}: {kind} rows cannot be mixed with {sorted(self.kinds - {kind})[0]} rows"
            )
        if kind == "pair" and len(self.stores) == 1:
            self.stores.append(TokenStore())
        for store, part in zip(self.stores, kept, strict=True):
            store.append(part)
        self.places.extend((number, line))
        if isinstance(example, Judged):
            self.desirable.append(example.desirable)

    def _refuse_duplicate(self, parts: Parts) -> None:
        if not self.settings.drop_duplicates:
            return
        digest = hashlib.blake2b(digest_size=12)
        for part in parts:
            digest.update(array("i", part.ids).tobytes() + repr(part.trained).encode())
        key = digest.digest()
        if key in self.hashes:
            raise BadRowError("duplicate", "the same as an earlier row")
        self.hashes.add(key)

    def _cut(self, parts: Parts) -> list[Encoded]:
        limit = self.settings.max_seq_len
        kept = [cut(part, limit) for part in parts]
        if not all(map(is_trainable, kept)):
            prompt = max(part.trained[0][0] if part.trained else len(part.ids) for part in parts)
            self.tally.longest_prompt = max(self.tally.longest_prompt, prompt)
            at = f" at max_seq_len {limit}" if limit is not None else ""
            raise BadRowError("no trainable token", f"no trainable token{at} (its prompt has {prompt})")
        self.tally.truncated += any(len(a.ids) < len(b.ids) for a, b in zip(kept, parts, strict=True))
        return kept

    def _refuse_if_bad(self) -> None:
        tally, names = self.tally, ", ".join(source.name for source in self.sources[:3])
        bad = tally.dropped.total()
        if not bad or (len(self.stores[0]) and self.settings.on_bad_row == "drop"):
            return
        first = "; ".join(tally.problems[:3])
        hidden = tally.dropped["no trainable token"]
        if hidden and hidden == bad and self.settings.max_seq_len is not None:
            raise ValueError(
                f"{names}: {hidden} of {tally.seen} rows have no trainable token at max_seq_len "
                f"{self.settings.max_seq_len} (longest prompt {tally.longest_prompt}); raise max_seq_len"
            )
        what = "none can be used" if not len(self.stores[0]) else "on_bad_row is error"
        raise ValueError(f"{names}: {bad} of {tally.seen} rows are bad ({tally.summary()}), {what}: {first}")


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` rows, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
