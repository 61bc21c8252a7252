"""Packed streams in given shares, which are shares of packs, that is of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from tt_data.dataset import Row, TokenDataset
from tt_data.order import place_in_mix, steps_per_epoch
from tt_data.report import add_reports
from tt_data.stream.packed import PackedStream, hash_of
from tt_data.views import interleave, quotas_of


class PackedMix:
    """Rounds that hold every stream's quota of packs, for ``batches``.

    An epoch is as many rounds as the first stream to run out of packs has; the others go on where they stopped in the
    next epoch. No stream is read further than a step needs, so the first batch does not wait for the last row.
    """

    def __init__(self, parts: Sequence[PackedStream], weights: Sequence[float]) -> None:
        self.parts, self.quotas = list(parts), quotas_of(weights)
        self._round = interleave(self.quotas)
        self._nth = [self._round[:slot].count(source) for slot, source in enumerate(self._round)]
        self._rounds: int | None = None  # of an epoch, once the end has been seen
        self.tokenizer, self.pad_id, self.kind = parts[0].tokenizer, parts[0].pad_id, parts[0].kind
        self.schema = "+".join(dict.fromkeys(part.schema for part in parts))
        self.names = [name for part in parts for name in part.names]
        content = f"{[part.fingerprint for part in parts]} {self.quotas}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

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
        """The epoch of a step and its places in it."""
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
        rounds = self._rounds or 0  # unknown in the first epoch, where it does not matter
        nth = (epoch * rounds + which) * quota + self._nth[slot]
        turn, place = (0, nth) if part.has(nth + 1, seed=seed) else divmod(nth, part.num_packs)
        block, within = part.find(place)
        packs = part.packs_of(block, seed=seed, count=turn == 0)  # the same packs in every turn, in another order
        if shuffle:
            window = range(epoch * rounds * quota, (epoch + 1) * rounds * quota) if epoch else None
            within = place_in_mix(within, len(packs), first=nth - within, window=window, key=(seed, block))
        return packs.row(within)

    def rows_of_step(
        self, step: int, *, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool
    ) -> tuple[list[Row], int]:
        """This rank's packs of a step, and how many a rank has at most in it."""
        epoch, places = self.locate(step, batch_size, seed=seed)
        rows = [self.pack_at(epoch, place, seed=seed, shuffle=shuffle) for place in places[rank::world_size]]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"{', '.join(self.names[:3])}: preference rows cannot be mixed with other rows")
        return rows, len(places[0::world_size])

    def take_news(self, worker: int) -> list[Any] | None:
        """What a worker has counted; every one counts the same, so the first one tells."""
        news = [part.take_news(worker) for part in self.parts]
        return news if worker == 0 else None

    def add_news(self, news: list[Any]) -> None:
        for part, told in zip(self.parts, news, strict=True):
            part.add_news(told)

    def blank(self) -> Row:
        """Two padding tokens in the shape of a pack."""
        return self.parts[0].blank()

    def head(self, rows: int = 16) -> TokenDataset:
        """The first rows as a data set of their own, to look at."""
        return self.parts[0].rows.head(rows)

    def rendered(self, i: int) -> list[tuple[str, bool]]:
        """Document ``i`` of the first stream as text pieces and whether each is trained."""
        return self.parts[0].rendered(i)

    def head_report(self) -> dict[str, Any]:
        """What becomes of the first rows of every stream."""
        reports = [part.head_report() for part in self.parts]
        total = add_reports(reports, self.schema, sum(report["rows"] for report in reports))
        return {**total, "streaming": True}

    @property
    def report(self) -> dict[str, Any]:
        reports = [part.report for part in self.parts]
        packs, tokens = sum(part.num_packs for part in self.parts), sum(sum(part.tokens) for part in self.parts)
        efficiency = {"efficiency": round(tokens / (packs * self.parts[0].max_seq_len), 4)} if packs else {}
        total = add_reports(reports, self.schema, sum(report["rows"] for report in reports))
        return {**total, "streaming": True, "packs": packs, **efficiency}
