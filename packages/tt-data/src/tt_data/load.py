"""``load_dataset``: from whatever rows there are to token rows, with every row accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack, overload

from tt_data import cache
from tt_data.builder import build, fingerprint_of
from tt_data.dataset import Dataset, TokenDataset
from tt_data.messages import TrainOn
from tt_data.order import quotas_of
from tt_data.report import refuse_dropped
from tt_data.rows.hub import DATASETS, Part
from tt_data.rows.schemas import Read
from tt_data.rows.settings import OnBadRow, Settings
from tt_data.rows.sources import NO_PART, as_files, is_hub_id, open_sources
from tt_data.stream.packed import PackedMix, PackedStream
from tt_data.stream.raw import RawStream, hub_stream, to_stream
from tt_data.stream.shuffled import StreamDataset
from tt_data.stream.stream import Stream
from tt_data.text.choose import SpecialTokensInText, choose_template
from tt_data.text.tokenizer import Tokenizer
from tt_data.views import MixedDataset, PackedDataset
from tt_data.wording import visible


class Frame(Protocol):
    """A pandas DataFrame."""

    def iterrows(self) -> Any: ...


Source = str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]] | Frame
Mix = Mapping[Any, float]  # a Source that is a str or a Path, and its weight


class LoadOptions(TypedDict, total=False):
    """The arguments of ``load_dataset`` that do not decide what kind of data set it returns."""

    columns: Mapping[str, str] | None
    train_on: TrainOn
    max_seq_len: int | None
    split: str | None
    seed: int
    template: str | None
    schema: str | None
    on_bad_row: OnBadRow
    special_tokens: SpecialTokensInText
    drop_duplicates: bool
    max_dropped_share: float | None
    buffer: int
    cache_dir: str | Path | None
    num_workers: int
    timeout_s: float
    data_dir: str | None
    data_files: Any
    revision: str | None
    limit: int | None


@overload
def load_dataset(
    source: Mix, tokenizer: Tokenizer, *, packing: bool = ..., streaming: Literal[False] = ...,
    **options: Unpack[LoadOptions],
) -> MixedDataset: ...  # fmt: skip
@overload
def load_dataset(
    source: Source, tokenizer: Tokenizer, *, packing: Literal[False] = ..., streaming: Literal[False] = ...,
    **options: Unpack[LoadOptions],
) -> TokenDataset: ...  # fmt: skip
@overload
def load_dataset(
    source: Source, tokenizer: Tokenizer, *, packing: Literal[True], streaming: Literal[False] = ...,
    **options: Unpack[LoadOptions],
) -> PackedDataset: ...  # fmt: skip
@overload
def load_dataset(
    source: Source | Mix, tokenizer: Tokenizer, *, packing: Literal[False] = ..., streaming: Literal[True],
    **options: Unpack[LoadOptions],
) -> StreamDataset: ...  # fmt: skip
@overload
def load_dataset(
    source: Source | Mix, tokenizer: Tokenizer, *, packing: bool = ..., streaming: Literal[True],
    **options: Unpack[LoadOptions],
) -> Stream: ...  # fmt: skip
@overload
def load_dataset(
    source: Source | Mix, tokenizer: Tokenizer, *, packing: bool = ..., streaming: bool = ...,
    **options: Unpack[LoadOptions],
) -> Dataset | Stream: ...  # fmt: skip


def load_dataset(
    source: Source | Mix, tokenizer: Tokenizer, *, columns: Mapping[str, str] | None = None,
    train_on: TrainOn = "assistant", max_seq_len: int | None = None, packing: bool = False, split: str | None = None,
    seed: int = 0, streaming: bool = False, template: str | None = None, schema: str | None = None,
    on_bad_row: OnBadRow = "drop", special_tokens: SpecialTokensInText = "text", drop_duplicates: bool = True,
    max_dropped_share: float | None = None, buffer: int = 10_000, cache_dir: str | Path | None = None,
    num_workers: int = 0, timeout_s: float = 300.0, data_dir: str | None = None, data_files: Any = None,
    revision: str | None = None, limit: int | None = None,
) -> Dataset | Stream:  # fmt: skip
    """Token ids and labels of the rows of a file, several files, a directory, a hub id, a registered name, rows in
    memory, or a mix ``{source: weight}`` of these.

    Rows:
        columns: our names of columns to the names in the rows, if they differ.
        schema: the kind of the rows; by default it follows from their columns.
        template: a built-in chat or instruct template, or a ``.jinja`` file, instead of the model's own template.
        train_on: the turns that give loss.
        special_tokens: whether ``</s>`` and similar strings in the rows stay text, or become special tokens (for
            columns that a template has rendered already).
        max_seq_len: rows are cut there, in tokens.
        packing: put whole documents together in rows of ``max_seq_len`` tokens; ``seed`` decides which.

    Bad rows:
        on_bad_row: count and drop them, or refuse them.
        max_dropped_share: a larger share of bad rows is an error.
        drop_duplicates: keep one of several equal rows. A file that is given twice counts twice.

    Reading:
        split, data_dir, data_files, revision: as in ``datasets.load_dataset``; all but the last work for directories.
        limit: stop reading after this many usable rows.
        streaming: read during training, shuffled within ``buffer`` rows.
        cache_dir: keep token rows there and read them next time.
        num_workers: processes that encode rows (for a stream: an argument of ``batches``). A process that does not
            answer within ``timeout_s`` seconds is an error.

    Raises ValueError or FileNotFoundError that names the file and the line.
    """
    _check_types(
        columns=columns, packing=packing, split=split, seed=seed, streaming=streaming, template=template, schema=schema,
        max_seq_len=max_seq_len, drop_duplicates=drop_duplicates, max_dropped_share=max_dropped_share, buffer=buffer,
        num_workers=num_workers, timeout_s=timeout_s, data_dir=data_dir, revision=revision, limit=limit,
        train_on=train_on, on_bad_row=on_bad_row, special_tokens=special_tokens,
    )  # fmt: skip
    settings = Settings(
        columns=dict(columns or {}), train_on=train_on, max_seq_len=max_seq_len, template=template, schema=schema,
        on_bad_row=on_bad_row, special_tokens=special_tokens, drop_duplicates=drop_duplicates and not streaming,
        max_dropped_share=max_dropped_share,
    )  # fmt: skip
    loader = Loader(
        tokenizer=tokenizer, settings=settings, packing=packing, seed=seed, buffer=buffer, limit=limit,
        part=Part(split=split, data_dir=data_dir, data_files=data_files, revision=revision),
        cache_dir=None if cache_dir is None else Path(cache_dir), num_workers=num_workers, timeout_s=timeout_s,
    )  # fmt: skip
    return loader.stream(source) if streaming else loader.load(source)


_KINDS: Mapping[str, tuple[type, ...]] = {
    "a name": (str,), "true or false": (bool,), "a whole number": (int,), "a number": (int, float),
    "an object of names": (Mapping,),
}  # fmt: skip
_WANTED = {
    "columns": "an object of names", "packing": "true or false", "streaming": "true or false", "seed": "a whole number",
    "drop_duplicates": "true or false", "max_seq_len": "a whole number", "buffer": "a whole number", "limit":
    "a whole number", "num_workers": "a whole number", "timeout_s": "a number", "max_dropped_share": "a number",
}  # fmt: skip
_LONGEST = 1000  # characters of a name
_OPTIONAL = (
    "columns",
    "split",
    "template",
    "schema",
    "max_seq_len",
    "max_dropped_share",
    "data_dir",
    "revision",
    "limit",
)


def _check_types(**values: Any) -> None:
    """Raise ValueError for an argument of a wrong type."""
    for name, value in values.items():
        wanted = _WANTED.get(name, "a name")
        fits = isinstance(value, _KINDS[wanted]) and isinstance(value, bool) == (wanted == "true or false")
        if wanted == "an object of names" and fits:
            fits = all(isinstance(word, str) for pair in value.items() for word in pair)
        if wanted == "a name" and fits:
            fits = len(value) < _LONGEST and value.isprintable()
        if not fits and not (value is None and name in _OPTIONAL):
            raise ValueError(f"{name} must be {wanted}, got {visible(repr(value), 80)}")


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The arguments of ``load_dataset`` that all of a mix's sources share. ``read`` (named ``schema``): how rows are
    read, whatever their columns are."""

    tokenizer: Tokenizer
    settings: Settings
    packing: bool = False
    part: Part = NO_PART
    seed: int = 0
    buffer: int = 10_000
    cache_dir: Path | None = None
    read: Read | None = None
    schema: str = ""
    num_workers: int = 0
    timeout_s: float = 300.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.packing and self.settings.max_seq_len is None:
            raise ValueError("packing needs max_seq_len: the length of a packed row")
        if self.limit is not None and (self.limit < 1 or self.packing):
            raise ValueError(f"limit must be at least 1 and not with packing, which needs all rows; got {self.limit}")

    def load(self, source: Source | Mix) -> TokenDataset | PackedDataset | MixedDataset:
        """All rows of a source, or of several in turn."""
        if isinstance(source, Mapping):
            return self._mixed(source)
        source, settings, part = self._resolved(source)
        tokenizer = choose_template(self.tokenizer, settings.template, special_tokens=settings.special_tokens)
        sources = open_sources(source, part)
        known = self.read is None and self.limit is None
        fingerprint = fingerprint_of(sources, tokenizer, settings) if known else None
        cache_dir = self.cache_dir if known else None
        rows = cache.load(str(fingerprint), tokenizer, cache_dir) if cache_dir is not None else None
        if rows is None:
            rows = build(
                sources, tokenizer, settings, read=self.read, schema=self.schema, fingerprint=fingerprint,
                num_workers=self.num_workers, timeout_s=self.timeout_s, limit=self.limit,
            )  # fmt: skip
            if cache_dir is not None:
                cache.save(rows, cache_dir)
        rows.seed, rows.max_seq_len = self.seed, settings.max_seq_len
        rows.files_left_out = [file for found in sources for file in found.beside]
        refuse_dropped(rows.report, settings.max_dropped_share, name=", ".join(rows.names[:3]))
        if self.packing and settings.max_seq_len:
            return PackedDataset(rows, max_seq_len=settings.max_seq_len, seed=self.seed)
        return rows

    def _mixed(self, source: Mix) -> MixedDataset:
        names, weights = _weighted(source)
        quotas = quotas_of(weights)
        rounds = None if self.limit is None else -(-self.limit // sum(quotas))
        limits = [None if rounds is None else rounds * quota for quota in quotas]
        parts = [replace(self, limit=limit).load(name) for name, limit in zip(names, limits, strict=True)]
        return MixedDataset(parts, weights, names=names, seed=self.seed)

    def stream(self, source: Source | Mix) -> StreamDataset | PackedStream | PackedMix:
        """The rows of a source, or of several in turn, as they are needed."""
        if isinstance(source, Mapping):
            names, weights = _weighted(source)
            return PackedMix([self._packed(n) for n in names], weights) if self.packing else self._rows(names, weights)
        return self._packed(source) if self.packing else self._rows([source])

    def _packed(self, source: Source) -> PackedStream:
        assert self.settings.max_seq_len is not None
        return PackedStream(self._rows([source]), max_seq_len=self.settings.max_seq_len, index_dir=self.cache_dir)

    def _rows(self, sources: Sequence[Source], weights: list[float] | None = None) -> StreamDataset:
        resolved = [self._resolved(source) for source in sources]
        settings = resolved[0][1]
        if any(other != settings for _, other, _ in resolved):
            raise ValueError(
                "a streamed mix cannot hold data sets that need different templates or columns; leave streaming off"
            )
        groups: list[list[RawStream]] = []
        left_out: list[str] = []
        for source, _, part in resolved:
            if is_hub_id(source):
                groups.append([hub_stream(str(source), part)])
                continue
            opened = open_sources(source, part)
            groups.append([to_stream(found) for found in opened])
            left_out += [file for found in opened for file in found.beside]
        tokenizer = choose_template(self.tokenizer, settings.template, special_tokens=settings.special_tokens)
        return StreamDataset(
            groups, tokenizer, settings, buffer=self.buffer, weights=weights, read=self.read, schema=self.schema,
            files_left_out=left_out,
        )  # fmt: skip

    def _resolved(self, source: Source) -> tuple[Source, Settings, Part]:
        """A registered name's source, columns, template and part, if the arguments do not name others."""
        named = DATASETS.get(source) if isinstance(source, str) and not os.path.lexists(source) else None
        if named is None:
            source, part = as_files(source, self.part)
            return source, self.settings, part
        settings = replace(
            self.settings,
            columns={**named.columns, **self.settings.columns},
            template=self.settings.template or named.template,
        )
        return named.source, settings, self.part.over(named.part)


def _weighted(source: Mix) -> tuple[list[Any], list[float]]:
    if not source:
        raise ValueError("data source: an empty mix, expected {source: weight}")
    return list(source), list(source.values())
