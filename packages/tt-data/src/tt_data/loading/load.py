"""``load_dataset``: from whatever rows there are to token rows, with every row accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack, cast, overload

from tt_data.encoding.encode import build
from tt_data.loading import cache
from tt_data.loading.sample import sampled
from tt_data.messages import TrainOn
from tt_data.report import SAMPLE_ENDS, refuse_dropped
from tt_data.rows.hub import Part
from tt_data.rows.schemas import OnBadRow, Progress, Settings, fingerprint_of
from tt_data.rows.sources import is_hub_id, open_sources, resolve_name
from tt_data.stream.packed import PackedMix, PackedStream
from tt_data.stream.raw import RawStream, hub_stream, to_stream
from tt_data.stream.shuffled import StreamDataset
from tt_data.stream.stream import Stream
from tt_data.text.load import SpecialTokensInText, choose_template
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import Dataset, TokenDataset
from tt_data.token_rows.order import quotas_of
from tt_data.token_rows.views import MixedDataset, PackedDataset


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
    spare_workers: int
    timeout_s: float
    data_dir: str | None
    data_files: Any
    revision: str | None
    limit: int | None
    sample: bool
    progress: Progress | None


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
    num_workers: int = 0, spare_workers: int = 0, timeout_s: float = 300.0, data_dir: str | None = None,
    data_files: Any = None, revision: str | None = None, limit: int | None = None, sample: bool = False,
    progress: Progress | None = None,
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
        sample: of a source of more than 10,000 rows, read the first, the last and others at even distances, to check
            it quickly. Not with ``streaming`` or ``limit``.
        streaming: read during training, shuffled within ``buffer`` rows.
        cache_dir: keep token rows there and read them next time.
        num_workers: processes that encode rows (for a stream: an argument of ``batches``). A process that does not
            answer within ``timeout_s`` seconds is an error.
        spare_workers: processes that encode the rows of a source after its first 8,192, unless there are
            ``num_workers``. The rows are the same.
        progress: called about every 512 rows that are encoded, with the number of rows read so far and a function that
            counts all rows in about a second: an int, a float if it is an estimate, or None. Not for a stream.

    Raises ValueError or FileNotFoundError that names the file and the line.
    """
    settings = Settings(
        columns={} if columns is None else columns, train_on=train_on, max_seq_len=max_seq_len, packing=packing,
        seed=seed, streaming=streaming, template=template, schema=schema, on_bad_row=on_bad_row,
        special_tokens=special_tokens, drop_duplicates=drop_duplicates, max_dropped_share=max_dropped_share,
        buffer=buffer, cache_dir=cache_dir, num_workers=num_workers, spare_workers=spare_workers, timeout_s=timeout_s,
        limit=limit, sample=sample, progress=progress,
        part=Part(split=split, data_dir=data_dir, data_files=data_files, revision=revision),
    )  # fmt: skip
    return load(source, tokenizer, settings)


def load(source: Source | Mix, tokenizer: Tokenizer, settings: Settings) -> Dataset | Stream:
    """All rows of a source, or of several in turn, or a stream of them."""
    if settings.streaming:
        return _stream(source, tokenizer, settings)
    if isinstance(source, Mapping):
        return _mixed(source, tokenizer, settings)
    if isinstance(source, str) and not os.path.lexists(source):
        source, settings = _resolved(source, settings)
    if settings.template is not None or settings.special_tokens != "text":
        tokenizer = choose_template(tokenizer, settings.template, special_tokens=settings.special_tokens)
    sources = open_sources(source, settings.part)
    if settings.sample:
        sources = [sampled(found) for found in sources]
    known = settings.read is None and settings.limit is None and not settings.sample
    fingerprint = fingerprint_of([found.digest() for found in sources], tokenizer, settings) if known else None
    cache_dir = Path(settings.cache_dir) if known and settings.cache_dir is not None else None
    rows = cache.load(str(fingerprint), tokenizer, cache_dir) if cache_dir is not None else None
    if rows is None:
        rows = build(sources, tokenizer, settings, fingerprint=fingerprint)
        if cache_dir is not None:
            cache.save(rows, cache_dir)
    rows.seed, rows.max_seq_len = settings.seed, settings.max_seq_len
    rows.files_left_out = [file for found in sources for file in found.beside]
    if settings.max_dropped_share is not None:
        spare = sum(2 * SAMPLE_ENDS for found in sources if found.sampled_from)
        refuse_dropped(rows.report, settings.max_dropped_share, name=", ".join(rows.names[:3]), spare=spare)
    if settings.packing and settings.max_seq_len:
        return PackedDataset(rows, max_seq_len=settings.max_seq_len, seed=settings.seed)
    return rows


def _resolved(source: Source, settings: Settings) -> tuple[Source, Settings]:
    """The source that a registered name means, with its columns, template and part, unless the settings say others."""
    if not isinstance(source, str) or os.path.lexists(source):
        return source, settings
    found, part, named = resolve_name(source, settings.part)
    if named is None:
        return found, replace(settings, part=part)
    columns = {**named.columns, **settings.columns}
    return found, replace(settings, part=part, columns=columns, template=settings.template or named.template)


def _mixed(source: Mix, tokenizer: Tokenizer, settings: Settings) -> MixedDataset:
    names, weights = _weighted(source)
    quotas = quotas_of(weights)
    rounds = None if settings.limit is None else -(-settings.limit // sum(quotas))
    limits = [None if rounds is None else rounds * quota for quota in quotas]
    parts = [load(name, tokenizer, replace(settings, limit=limit)) for name, limit in zip(names, limits, strict=True)]
    return MixedDataset(cast("list[Dataset]", parts), weights, names=names, seed=settings.seed)


def _weighted(source: Mix) -> tuple[list[Any], list[float]]:
    if not source:
        raise ValueError("data source: an empty mix, expected {source: weight}")
    return list(source), list(source.values())


def _stream(source: Source | Mix, tokenizer: Tokenizer, settings: Settings) -> Stream:
    """The rows of a source, or of several in turn, as they are needed."""
    names, weights = _weighted(source) if isinstance(source, Mapping) else ([source], None)
    if not settings.packing:
        return _rows(names, weights, tokenizer, settings)
    assert settings.max_seq_len is not None
    folder = None if settings.cache_dir is None else Path(settings.cache_dir)
    parts = [_rows([name], None, tokenizer, settings) for name in names]
    packed = [PackedStream(part, max_seq_len=settings.max_seq_len, index_dir=folder) for part in parts]
    return packed[0] if weights is None else PackedMix(packed, weights)


def _rows(
    names: Sequence[Source], weights: list[float] | None, tokenizer: Tokenizer, settings: Settings
) -> StreamDataset:
    resolved = [_resolved(name, settings) for name in names]
    settings = resolved[0][1]
    if any((other.columns, other.template) != (settings.columns, settings.template) for _, other in resolved):
        raise ValueError(
            "a streamed mix cannot hold data sets that need different templates or columns; leave streaming off"
        )
    groups: list[list[RawStream]] = []
    left_out: list[str] = []
    for source, own in resolved:
        if is_hub_id(source):
            groups.append([hub_stream(str(source), own.part)])
            continue
        opened = open_sources(source, own.part)
        groups.append([to_stream(found) for found in opened])
        left_out += [file for found in opened for file in found.beside]
    tokenizer = choose_template(tokenizer, settings.template, special_tokens=settings.special_tokens)
    return StreamDataset(groups, tokenizer, settings, weights=weights, files_left_out=left_out)
