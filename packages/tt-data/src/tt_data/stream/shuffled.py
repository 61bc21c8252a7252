"""Rows read during training: shuffled within a buffer, resumed at any step, in memory that does not grow.

A stream is cut into blocks of ``buffer`` rows, and each block is shuffled on its own. So which row comes where is a
function of (seed, epoch, place), and a run that starts at step k opens the source in the middle instead of reading up
to there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from tt_data.encoding.encode import TokenRow, build, digest_of, encode_rows
from tt_data.examples import Judged, Kind, Pair
from tt_data.report import Report, Tally, refuse_dropped
from tt_data.rows.schemas import Read, Settings, choose_schema, fingerprint_of
from tt_data.rows.sources import Source
from tt_data.stream.raw import Raw, RawStream
from tt_data.stream.stream import Stream
from tt_data.template.spans import Encoded
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import Row, TokenDataset, TokenStore, to_row
from tt_data.token_rows.mismatched import mismatched
from tt_data.token_rows.order import Permutation, interleave, place_in_mix, quotas_of, steps_per_epoch
from tt_data.wording import counted

_ENOUGH = 200  # rows of a stream, from which the share of bad ones is judged
_OTHERS = 256  # judged rows at the beginning of a stream whose answers others are paired with
Place = tuple[int, int, Any]  # which stream, line, raw row
Order = Callable[[int, int, int], int]  # (block, place in it, its size) -> which of its rows


class Blocks:
    """The raw rows of streams, one after the other, in blocks of ``size``."""

    def __init__(self, streams: Sequence[RawStream], size: int) -> None:
        self.streams, self.size = list(streams), size
        self.total: int | None = None  # rows, once the end has been seen
        self._kept: dict[int, list[Place]] = {}
        self._rows: Iterator[Place] = iter(())
        self._next = -1  # the block that ``_rows`` begins with

    def get(self, number: int) -> list[Place]:
        """Block ``number``; shorter than ``size`` (or empty) at the end."""
        if number not in self._kept:
            if self._next != number:
                self._rows = self._open(number * self.size)
            block = list(islice(self._rows, self.size))
            self._next = number + 1
            if len(block) < self.size and self.total is None:
                self.total = number * self.size + len(block) if block or number == 0 else self.count()
            self._kept = {n: b for n, b in self._kept.items() if n == number - 1} | {number: block}
        return self._kept[number]

    def count(self) -> int:
        """How many rows there are, read if need be."""
        if self.total is None:
            self.total = sum(stream.count() for stream in self.streams)
        return self.total

    def row(self, place: int, order: Order | None) -> Place:
        """The row at ``place``, in the ``order`` of its block (None: as in the source)."""
        number, within = divmod(place, self.size)
        block = self.get(number)
        return block[within if order is None else order(number, within, len(block))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_rows": iter(()), "_next": -1}  # an open file stays in its process

    def _open(self, start: int) -> Iterator[Place]:
        for number, stream in enumerate(self.streams):
            if start:
                size = stream.count()
                if start >= size:
                    start -= size
                    continue
            for line, raw in stream.open_at(start):
                yield number, line, raw
            start = 0


class StreamDataset(Stream):
    """Rows for ``batches``, encoded as they are needed.

    Steps count the rows of the source: a step that holds a bad row is short of it. Duplicates are kept.
    ``report`` counts what this process has read of the first epoch.
    """

    def __init__(
        self, groups: Sequence[Sequence[RawStream]], tokenizer: Tokenizer, settings: Settings, *,
        weights: Sequence[float] | None = None, files_left_out: Sequence[str] = (),
    ) -> None:  # fmt: skip
        buffer, read = settings.buffer, settings.read
        if buffer <= 0:
            raise ValueError(f"buffer must be positive, got {buffer}")
        self.tokenizer, self.settings, self.pad_id = tokenizer, settings, tokenizer.pad_id
        self.blocks = [Blocks(group, buffer) for group in groups]
        self.quotas = quotas_of(weights) if weights else [1]
        self._round = interleave(self.quotas)
        self.tally, self.files_left_out = Tally(), list(files_left_out)
        self._kind: Kind | None = None
        self._others: TokenStore | None = None  # the first judged answers
        self._readers: dict[str, tuple[Read, str]] = {}
        for stream in (stream for group in groups for stream in group):
            self._readers[stream.name] = (read, settings.read_as) if read else self._reader_of(stream)
        self.names = list(self._readers)
        self.schema = "+".join(dict.fromkeys(name for _, name in self._readers.values()))
        content = [stream.digest() for group in groups for stream in group]
        self.fingerprint = fingerprint_of(content, tokenizer, settings, f"{self.quotas} {buffer}")

    @property
    def kind(self) -> Kind:
        """What a row holds (``single``, ``pair`` or ``judged``), from the first one that can be read."""
        if self._kind is None:
            stream = self.blocks[0].streams[0]
            for _, row in islice(_parsed_rows(stream), 4096):
                with contextlib.suppress(Exception):  # a bad row; or a mistake, which is named when the row is encoded
                    example = self._readers[stream.name][0](row, self.settings.columns)
                    return example.kind if isinstance(example, (Pair, Judged)) else "single"
        return self._kind or "single"

    def _reader_of(self, stream: RawStream) -> tuple[Read, str]:
        """The schema of a stream's first row. Raises ValueError for an empty one."""
        for line, raw in stream.open_at(0):
            row = stream.parse(line, raw)
            if row is not None:
                schema = choose_schema(row, self.tokenizer, self.settings, where=f"{stream.name}:{line}")
                return schema.read, schema.name
        raise ValueError(f"{stream.name} has 0 rows; give a file with rows")

    def count_rows(self) -> int:
        """Rows of an epoch, bad ones included: ``steps_per_epoch(ds.count_rows(), batch_size)`` is exact."""
        if len(self.blocks) == 1:
            return self.blocks[0].count()
        return min(b.count() // q for b, q in zip(self.blocks, self.quotas, strict=True)) * len(self._round)

    def locate(self, step: int, batch_size: int, *, seed: int = 0) -> tuple[int, range]:
        """The epoch of a step and its places; the end of the stream is looked for no further than the step reaches."""
        if len(self.blocks) == 1 and self.blocks[0].total is None:
            places = range(step * batch_size, (step + 1) * batch_size)
            size = self.blocks[0].size
            numbers = range(places.start // size, (places.stop - 1) // size + 1)
            if all(len(self.blocks[0].get(number)) == size for number in numbers):
                return 0, places
        rows = self.count_rows()
        if rows == 0:
            raise ValueError(f"the mix {self.quotas} has no whole round of rows; round the weights")
        epoch, within = divmod(step, steps_per_epoch(rows, batch_size))
        return epoch, range(within * batch_size, min((within + 1) * batch_size, rows))

    def raw_row(self, epoch: int, place: int, *, seed: int, shuffle: bool) -> tuple[RawStream, int, Any]:
        """The row at a place of an epoch, not parsed."""
        if len(self.blocks) == 1:
            blocks, within = self.blocks[0], place

            def order(number: int, at: int, size: int) -> int:
                return Permutation(size, (seed, epoch, number))(at)
        else:
            which, slot = divmod(place, len(self._round))
            source = self._round[slot]
            blocks, quota = self.blocks[source], self.quotas[source]
            rounds = self.count_rows() // len(self._round)
            nth = (epoch * rounds + which) * quota + self._round[:slot].count(source)
            window = range(epoch * rounds * quota, (epoch + 1) * rounds * quota) if epoch else None
            within = nth % blocks.count()

            def order(number: int, at: int, size: int) -> int:
                return place_in_mix(at, size, first=nth - at, window=window, key=(seed, source, number))

        number, line, raw = blocks.row(within, order if shuffle else None)
        return blocks.streams[number], line, raw

    def encode(self, rows: Sequence[tuple[RawStream, int, Any]], *, count: bool = True) -> list[TokenRow]:
        """Token rows of raw ones; ``count`` them in the report. Raises ValueError if bad rows are refused."""
        encoded = self._encode(rows, self.tally if count else Tally())
        self._refuse_dropped()
        return encoded

    def _encode(self, rows: Sequence[tuple[RawStream, int, Any]], tally: Tally) -> list[TokenRow]:
        before, encoded = tally.dropped.total(), list[TokenRow]()
        by_name: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        for stream, line, raw in rows:
            row = stream.parse(line, raw)
            if row is not None:
                by_name.setdefault(stream.name, []).append((line, row))
        for name, present in by_name.items():
            encoded += encode_rows(
                name, present, tally=tally, read=self._readers[name][0], tokenizer=self.tokenizer,
                settings=self.settings,
            )  # fmt: skip
        for token_row in encoded:
            self._kind = self._kind or token_row.kind
            if token_row.kind != self._kind:
                raise ValueError(
                    f"line {token_row.line}: {token_row.kind} rows cannot be mixed with the {self._kind} rows before "
                    "them"
                )
            tally.truncated += token_row.truncated
            tally.no_end += token_row.no_end
        if self.settings.on_bad_row == "error" and tally.dropped.total() > before:
            raise ValueError(f"on_bad_row is error: {tally.problems[-1]}")
        return encoded

    def rows_of(self, epoch: int, places: range, *, seed: int, shuffle: bool) -> list[Row]:
        raw = [self.raw_row(epoch, place, seed=seed, shuffle=shuffle) for place in places]
        encoded = self.with_mismatched(self.encode(raw, count=epoch == 0))
        return [to_row(row.kind, row.parts, row.desirable) for row in encoded]

    def with_mismatched(self, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """``rows``; judged ones also with their prompt and the answer of one of the first rows of the stream, a pure
        function of the row and the ``seed`` of ``load_dataset``: the same in every epoch, so that packs are, too."""
        if not rows or rows[0].kind != "judged":
            return list(rows)
        if self._others is None:
            self._others = self.head(_OTHERS).stores[0]
        get, size, limit = self._others.get, len(self._others), self.settings.max_seq_len
        return [
            replace(row, parts=[*row.parts, mismatched(row.parts[0], get, size, key=key, max_seq_len=limit)])
            for row in rows
            for key in [(self.settings.seed, *digest_of(tuple(row.parts), row.desirable))]
        ]

    def take_news(self, worker: int) -> Tally:
        news, self.tally = self.tally, Tally()
        return news

    def add_news(self, news: Tally) -> None:
        self.tally.add(news)
        self._refuse_dropped()

    def _refuse_dropped(self) -> None:
        if (share := self.settings.max_dropped_share) is None:
            return
        totals = [blocks.total for blocks in self.blocks]
        whole = sum(total for total in totals if total is not None) if None not in totals else _ENOUGH
        if self.tally.seen >= min(whole, _ENOUGH):  # a short stream is judged once all of it was read
            refuse_dropped(self.report, share, name=", ".join(self.names[:3]))

    def blank(self) -> Row:
        """Two padding tokens in the shape of a row."""
        if self._kind is None:
            self._kind = self.kind
        sides = 1 if self._kind == "single" else 2
        return to_row(self._kind, [Encoded([self.pad_id] * 2)] * sides, False)

    def head(self, rows: int = 16) -> TokenDataset:
        streams = {stream.name: stream for blocks in self.blocks for stream in blocks.streams}
        sources = [Source(stream.name, partial(_parsed_rows, stream), stream.digest) for stream in streams.values()]
        first = build(sources, self.tokenizer, replace(self.settings, packing=False, limit=rows))
        first.files_left_out = self.files_left_out
        return first

    def head_report(self, *, rows: int = 256, seconds: float = 3.0) -> Report:
        """What becomes of the first ``rows`` of each source, or of those that ``seconds`` are enough for.

        Raises ValueError if none of them can be used, or if there are more bad rows than the settings allow.
        """
        tally, until, whole = Tally(), time.monotonic() + seconds, True
        for blocks in self.blocks:
            source = ((stream, line, raw) for stream in blocks.streams for line, raw in stream.open_at(0))
            first = islice(source, rows)
            while batch := list(islice(first, 16)):
                self._encode(batch, tally)
                if time.monotonic() > until:
                    break
            whole = whole and next(source, None) is None
        name = ", ".join(self.names[:3]) + ("" if whole else f" (the first {counted(tally.seen, 'row')})")
        tally.partial = not whole
        report = self._report(tally)
        if not report["rows"]:
            raise ValueError(f"{name}: none can be used ({tally.summary()}): {'; '.join(tally.problems[:3])}")
        if (share := self.settings.max_dropped_share) is not None and (whole or tally.seen >= _ENOUGH):
            refuse_dropped(report, share, name=name)
        return report

    @property
    def report(self) -> Report:
        return self._report(self.tally)

    def _report(self, tally: Tally) -> Report:
        kept = tally.seen - tally.dropped.total()
        return tally.report(self.schema, kept, files_left_out=self.files_left_out, streaming=True)


def _parsed_rows(stream: RawStream) -> Iterator[Raw]:
    parsed = ((line, stream.parse(line, raw)) for line, raw in stream.open_at(0))
    return ((line, row) for line, row in parsed if row is not None)
