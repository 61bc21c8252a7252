"""Streams whose documents are packed, block by block; and mixes of them."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tt_data.encoding.encode import TokenRow
from tt_data.examples import Kind
from tt_data.files import read_object, write_bytes
from tt_data.report import Report, Tally, add_reports
from tt_data.stream.shuffled import StreamDataset
from tt_data.stream.stream import Stream
from tt_data.token_rows.dataset import Row, TokenDataset, TokenStore, to_row
from tt_data.token_rows.order import Permutation, hash_of, interleave, place_in_mix, quotas_of, steps_per_epoch
from tt_data.token_rows.packing import join_documents, pack

_log = logging.getLogger(__name__)
_MAX_INDEX = 64 << 20  # bytes of the file that keeps the counts
News = tuple[Tally, list[int], list[int], bool]


class _Packs:
    """The documents of one block, in flat arrays, and which of them make up each pack."""

    def __init__(self, rows: Sequence[TokenRow], room: int, *, seed: int) -> None:
        self.kind: Kind = rows[0].kind if rows else "single"
        self.stores = [TokenStore() for _ in (rows[0].parts if rows else ())]
        for row in rows:
            for store, part in zip(self.stores, row.parts, strict=True):
                store.append(part)
        self.desirable = [row.desirable for row in rows]
        longer = max if self.kind == "judged" else sum  # mismatched answers have a row of their own
        lengths = [longer(len(part.ids) for part in row.parts) for row in rows]
        self.tokens = sum(len(part.ids) for row in rows for part in row.parts[: 1 if self.kind == "judged" else None])
        self.members = pack(lengths, room, seed=seed)

    def __len__(self) -> int:
        return len(self.members)

    def row(self, number: int) -> Row:
        rows = [(self.desirable[i], [store.get(i) for store in self.stores]) for i in self.members[number]]
        return join_documents([to_row(self.kind, sides, desirable) for desirable, sides in rows])


class PackedStream(Stream):
    """Packs of whole documents, each from one block of the stream, for ``batches``.

    How many packs a block gives follows from its lengths alone. These counts are all that resuming needs; they are
    kept in ``index_file``, without which the blocks before the first step are encoded once more to get them.
    Every rank and every worker encodes every block.
    """

    is_packed = True

    def __init__(self, rows: StreamDataset, *, max_seq_len: int, index_dir: Path | None = None) -> None:
        assert len(rows.blocks) == 1, "PackedMix packs several"
        self.rows, self.max_seq_len = rows, max_seq_len
        self.tokenizer, self.pad_id, self.schema, self.names = rows.tokenizer, rows.pad_id, rows.schema, rows.names
        self._kind = rows.kind
        self.room = max_seq_len * (2 if rows.kind == "pair" else 1)  # tokens of a pack
        content = f"{rows.fingerprint} packed {self.room}"
        content += f" {rows.settings.seed}" if rows.kind == "judged" else ""  # which draws answers of other lengths
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self.index_file = index_dir and index_dir / f"{self.fingerprint[:40]}-packs.json"
        self.counts: list[int] = []  # packs of each block
        self.tokens: list[int] = []  # and the tokens in them
        self.complete = False
        self._starts = [0]  # how many packs come before each block, and in all
        self._kept: dict[tuple[int, int, int], _Packs] = {}
        self._read_index()

    @property
    def kind(self) -> Kind:
        return self._kind

    def _read_index(self) -> None:
        if self.index_file is None or not self.index_file.is_file():
            return
        try:
            found = read_object(self.index_file, limit=_MAX_INDEX)
            counts, tokens, complete = list(found["counts"]), list(found["tokens"]), found["complete"] is True
            if found["fingerprint"] != self.fingerprint or len(counts) != len(tokens):
                return
            for count, number in zip(counts, tokens, strict=True):
                if type(count) is not int or type(number) is not int or not 0 <= count <= number:
                    return
        except (OSError, ValueError, LookupError, TypeError):  # written again from scratch
            return
        self.counts, self.tokens, self.complete = counts, tokens, complete
        for count in counts:
            self._starts.append(self._starts[-1] + count)

    def _write_index(self) -> None:
        if self.index_file is None:
            return
        facts = {
            "fingerprint": self.fingerprint, "counts": self.counts, "tokens": self.tokens, "complete": self.complete,
        }  # fmt: skip
        try:
            self.index_file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.index_file, json.dumps(facts).encode())
        except OSError as error:
            _log.warning("%s: the index of packs was not written (%s)", self.index_file, error)
            self.index_file = None

    def packs_of(self, block: int, *, seed: int, epoch: int = 0, count: bool = False) -> _Packs:
        """The packs of a block as an epoch puts them together; ``count`` their rows in the report."""
        key = (block, seed, epoch)
        if key not in self._kept:
            raw = self.rows.blocks[0].get(block)
            streams = self.rows.blocks[0].streams
            encoded = self.rows.encode([(streams[n], line, data) for n, line, data in raw], count=count)
            encoded = self.rows.with_mismatched(encoded)
            self._kept = {k: v for k, v in self._kept.items() if k == (block - 1, seed, epoch)}
            self._kept[key] = _Packs(encoded, self.room, seed=hash_of(seed, epoch, block))
        return self._kept[key]

    def has(self, count: int, *, seed: int) -> bool:
        """Whether an epoch has ``count`` packs; reads on until that is certain."""
        while not self.complete and self._starts[-1] < count:
            block = len(self.counts)
            if self.rows.blocks[0].get(block):
                packs = self.packs_of(block, seed=seed, count=True)
                self.counts.append(len(packs))
                self.tokens.append(packs.tokens)
                self._starts.append(self._starts[-1] + len(packs))
            else:
                self.complete = True
            self._write_index()
        return self._starts[-1] >= count

    @property
    def num_packs(self) -> int:
        """Packs found so far; those of an epoch once the stream is ``complete``."""
        return self._starts[-1]

    def find(self, place: int) -> tuple[int, int]:
        """The block that the pack at a place of an epoch is in, and its place there. ``has`` must have found it."""
        block = bisect_right(self._starts, place) - 1
        return block, place - self._starts[block]

    def _pack_at(self, epoch: int, place: int, *, seed: int, shuffle: bool) -> Row:
        block, within = self.find(place)
        packs = self.packs_of(block, seed=seed, epoch=epoch, count=epoch == 0)
        return packs.row(Permutation(len(packs), (seed, epoch, block))(within) if shuffle else within)

    def locate(self, step: int, batch_size: int, *, seed: int) -> tuple[int, range]:
        if self.has((step + 1) * batch_size, seed=seed):
            return 0, range(step * batch_size, (step + 1) * batch_size)
        if not self.num_packs:
            raise ValueError(f"none of the rows can be used: {'; '.join(self.rows.tally.problems[:3])}")
        epoch, within = divmod(step, steps_per_epoch(self.num_packs, batch_size))
        return epoch, range(within * batch_size, min((within + 1) * batch_size, self.num_packs))

    def rows_of(self, epoch: int, places: range, *, seed: int, shuffle: bool) -> list[Row]:
        return [self._pack_at(epoch, place, seed=seed, shuffle=shuffle) for place in places]

    def take_news(self, worker: int) -> News | None:
        """What a worker has counted. All count the same, so only the first one reports."""
        news = self.rows.take_news(worker)
        return (news, self.counts, self.tokens, self.complete) if worker == 0 else None

    def add_news(self, news: News) -> None:
        tally, counts, tokens, self.complete = news
        for count in counts[len(self.counts) :]:
            self._starts.append(self._starts[-1] + count)
        self.counts, self.tokens = counts, tokens
        self.rows.add_news(tally)

    def blank(self) -> Row:
        """Two padding tokens in the shape of a pack."""
        return join_documents([self.rows.blank()])

    def head(self, rows: int = 16) -> TokenDataset:
        return self.rows.head(rows)

    def head_report(self) -> Report:
        return self.rows.head_report()

    @property
    def report(self) -> Report:
        full = self.num_packs * self.room
        report: Report = {**self.rows.report, "packs": self.num_packs}
        return {**report, "efficiency": round(sum(self.tokens) / full, 4)} if full else report


class PackedMix(Stream):
    """Rounds that hold every stream's quota of packs, for ``batches``.

    An epoch is as many rounds as the first stream to run out of packs has; the others continue in the next epoch, where
    they stopped. No stream is read further than a step needs, so the first batch does not wait for the last row.
    """

    is_packed = True

    def __init__(self, parts: Sequence[PackedStream], weights: Sequence[float]) -> None:
        self.parts, self.quotas = list(parts), quotas_of(weights)
        self._round = interleave(self.quotas)
        self._nth = [self._round[:slot].count(source) for slot, source in enumerate(self._round)]
        self._rounds: int | None = None  # of an epoch, once the end has been seen
        self.tokenizer, self.pad_id = parts[0].tokenizer, parts[0].pad_id
        self.schema = "+".join(dict.fromkeys(part.schema for part in parts))
        self.names = [name for part in parts for name in part.names]
        content = f"{[part.fingerprint for part in parts]} {self.quotas}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @property
    def kind(self) -> Kind:
        return self.parts[0].kind

    def _has(self, rounds: int, seed: int) -> bool:
        return all(
            part.has(rounds * quota, seed=hash_of(seed, source))
            for source, (part, quota) in enumerate(zip(self.parts, self.quotas, strict=True))
        )

    def _count_rounds(self, seed: int) -> int:
        """Once a stream has ended: the rounds that it, and all others, have."""
        rounds = min(
            part.num_packs // quota for part, quota in zip(self.parts, self.quotas, strict=True) if part.complete
        )
        while not self._has(rounds, seed):  # another one ends even earlier
            rounds = min(part.num_packs // q for part, q in zip(self.parts, self.quotas, strict=True) if part.complete)
        if rounds == 0:
            raise ValueError(f"the mix {self.quotas} has no whole round of packs; round the weights")
        return rounds

    def locate(self, step: int, batch_size: int, *, seed: int) -> tuple[int, range]:
        if self._rounds is None:
            if self._has(-(-(step + 1) * batch_size // len(self._round)), seed):
                return 0, range(step * batch_size, (step + 1) * batch_size)
            self._rounds = self._count_rounds(seed)
        rows = self._rounds * len(self._round)
        epoch, within = divmod(step, steps_per_epoch(rows, batch_size))
        return epoch, range(within * batch_size, min((within + 1) * batch_size, rows))

    def pack_at(self, epoch: int, place: int, *, seed: int, shuffle: bool) -> Row:
        """The pack at a place of an epoch."""
        which, slot = divmod(place, len(self._round))
        source = self._round[slot]
        part, quota, seed = self.parts[source], self.quotas[source], hash_of(seed, source)
        rounds = self._rounds or 0  # unknown in the first epoch, which does not need it
        nth = (epoch * rounds + which) * quota + self._nth[slot]
        turn, place = (0, nth) if part.has(nth + 1, seed=seed) else divmod(nth, part.num_packs)
        block, within = part.find(place)
        packs = part.packs_of(block, seed=seed, count=turn == 0)  # the same packs in every turn, in another order
        if shuffle:
            window = range(epoch * rounds * quota, (epoch + 1) * rounds * quota) if epoch else None
            within = place_in_mix(within, len(packs), first=nth - within, window=window, key=(seed, block))
        return packs.row(within)

    def rows_of(self, epoch: int, places: range, *, seed: int, shuffle: bool) -> list[Row]:
        rows = [self.pack_at(epoch, place, seed=seed, shuffle=shuffle) for place in places]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"{', '.join(self.names[:3])}: preference rows cannot be mixed with other rows")
        return rows

    def take_news(self, worker: int) -> list[Any] | None:
        """What a worker has counted. All count the same, so only the first one reports."""
        news = [part.take_news(worker) for part in self.parts]
        return news if worker == 0 else None

    def add_news(self, news: list[Any]) -> None:
        for part, counted in zip(self.parts, news, strict=True):
            part.add_news(counted)

    def blank(self) -> Row:
        """Two padding tokens in the shape of a pack."""
        return self.parts[0].blank()

    def head(self, rows: int = 16) -> TokenDataset:
        return self.parts[0].head(rows)

    def head_report(self) -> Report:
        reports = [part.head_report() for part in self.parts]
        total = add_reports(reports, self.schema, sum(report["rows"] for report in reports))
        return {**total, "streaming": True}

    @property
    def report(self) -> Report:
        reports = [part.report for part in self.parts]
        packs, tokens = sum(part.num_packs for part in self.parts), sum(sum(part.tokens) for part in self.parts)
        total = add_reports(reports, self.schema, sum(report["rows"] for report in reports))
        total = {**total, "streaming": True, "packs": packs}
        return {**total, "efficiency": round(tokens / (packs * self.parts[0].room), 4)} if packs else total
