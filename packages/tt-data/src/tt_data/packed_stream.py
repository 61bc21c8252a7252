"""A stream whose documents are packed, block by block."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from tt_data.dataset import Row, to_row
from tt_data.order import Permutation, steps_per_epoch
from tt_data.packing import join_documents, pack
from tt_data.row_encoder import Tally
from tt_data.stream import StreamDataset


class PackedStream:
    """Packs of whole documents, each from one block of the stream, for ``batches``.

    How many packs a block gives follows from its lengths alone. These counts are all that resuming needs; they are
    kept in ``index_file``, without which the blocks before the first step are encoded once more to get them.
    Every rank encodes every block.
    """

    def __init__(self, rows: StreamDataset, *, max_seq_len: int, index_dir: Path | None = None) -> None:
        if len(rows.blocks) > 1:
            raise ValueError("packing a streamed mix is not possible; leave streaming or packing off")
        self.rows, self.max_seq_len = rows, max_seq_len
        self.tokenizer, self.pad_id, self.schema = rows.tokenizer, rows.pad_id, rows.schema
        self.fingerprint = hashlib.sha256(f"{rows.fingerprint} packed {max_seq_len}".encode()).hexdigest()
        self.index_file = index_dir and index_dir / f"{self.fingerprint[:40]}-packs.json"
        self.counts: list[int] = []  # packs of each block
        self.complete = False
        self._kept: dict[tuple[int, int, int], list[list[Row]]] = {}
        self._read_index()

    def _read_index(self) -> None:
        if self.index_file is None or not self.index_file.is_file():
            return
        try:
            found = json.loads(self.index_file.read_text(encoding="utf-8"))
            if found["fingerprint"] == self.fingerprint and all(isinstance(n, int) for n in found["counts"]):
                self.counts, self.complete = list(found["counts"]), bool(found["complete"])
        except (ValueError, KeyError, TypeError):  # written again from scratch
            return

    def _write_index(self) -> None:
        if self.index_file is None:
            return
        self.index_file.parent.mkdir(parents=True, exist_ok=True)
        staging = self.index_file.with_name(f".{self.index_file.name}.{os.getpid()}")
        facts = {"fingerprint": self.fingerprint, "counts": self.counts, "complete": self.complete}
        staging.write_text(json.dumps(facts), encoding="utf-8")
        staging.replace(self.index_file)

    def packs_of(self, block: int, *, seed: int, epoch: int) -> list[list[Row]]:
        """The packs of a block, as lists of documents."""
        key = (block, seed, epoch)
        if key not in self._kept:
            raw = self.rows.blocks[0].get(block)
            streams = self.rows.blocks[0].streams
            encoded = self.rows.encode([(streams[n], line, data) for n, line, data in raw], count=epoch == 0)
            documents = [to_row(row.kind, row.parts, row.desirable) for row in encoded]
            lengths = [max(len(part.ids) for part in row.parts) for row in encoded]
            packs = pack(lengths, self.max_seq_len, seed=hash_of(seed, epoch, block))
            self._kept = {k: v for k, v in self._kept.items() if k == (block - 1, seed, epoch)}
            self._kept[key] = [[documents[d] for d in members] for members in packs]
        return self._kept[key]

    def _extend(self, *, seed: int) -> None:
        """Count the packs of one more block."""
        block = len(self.counts)
        if self.rows.blocks[0].get(block):
            self.counts.append(len(self.packs_of(block, seed=seed, epoch=0)))
        else:
            self.complete = True
        self._write_index()

    def locate(self, step: int, batch_size: int, *, seed: int) -> tuple[int, range]:
        """The epoch of a step and its packs, counted from the epoch's first."""
        while not self.complete and sum(self.counts) < (step + 1) * batch_size:
            self._extend(seed=seed)
        total = sum(self.counts)
        if not self.complete:
            return 0, range(step * batch_size, (step + 1) * batch_size)
        if not total:
            raise ValueError(f"none of the rows can be used: {'; '.join(self.rows.tally.problems[:3])}")
        epoch, within = divmod(step, steps_per_epoch(total, batch_size))
        return epoch, range(within * batch_size, min((within + 1) * batch_size, total))

    def rows_of_step(
        self, step: int, *, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool
    ) -> tuple[list[Row], int]:
        """This rank's packs of a step, and how many a rank has at most in it."""
        epoch, places = self.locate(step, batch_size, seed=seed)
        starts = [0, *accumulate(self.counts)]
        rows: list[Row] = []
        for place in places[rank::world_size]:
            block = bisect_right(starts, place) - 1
            packs = self.packs_of(block, seed=seed, epoch=epoch)
            within = place - starts[block]
            if shuffle:
                within = Permutation(len(packs), (seed, epoch, block))(within)
            rows.append(join_documents(packs[within]))
        return rows, len(places[0::world_size])

    def take_news(self, worker: int) -> tuple[Tally, list[int], bool] | None:
        """What a worker has counted; every one counts the same, so the first one tells."""
        news = self.rows.take_news(worker)
        return (news, self.counts, self.complete) if worker == 0 else None

    def add_news(self, news: tuple[Tally, list[int], bool]) -> None:
        tally, self.counts, self.complete = news
        self.rows.add_news(tally)

    def blank(self) -> Row:
        """Two padding tokens in the shape of a pack."""
        return join_documents([self.rows.blank()])

    def rendered(self, i: int) -> list[tuple[str, bool]]:
        """Document ``i`` of the stream as text pieces and whether each is trained."""
        return self.rows.rendered(i)

    @property
    def report(self) -> dict[str, Any]:
        return {**self.rows.report, "packs": sum(self.counts)}


def hash_of(*numbers: int) -> int:
    """One seed of several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
