"""Rows that processes encode.

A file apart from ``encode``: most data sets are encoded in this process.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

from tt_data.processes import CAN_FORK, map_in_processes
from tt_data.report import Tally
from tt_data.rows.schemas import Settings
from tt_data.wording import said

Batch = Sequence[tuple[int, Mapping[str, Any]]]  # line and row
_ALONE = 16  # batches that this process encodes before spare ones are worth their start


def encode_in_processes(
    encode: Callable[..., list[Any]], batches: Iterator[Batch], name: str, total: Tally, settings: Settings
) -> Generator[list[Any], None, None]:
    """``encode(batch, tally=...)`` for each of ``batches``; ``total`` counts all. A RuntimeError of a process names its
    rows. Spare processes take what is left of a large source."""
    workers = settings.num_workers
    if not workers:
        workers = settings.spare_workers if CAN_FORK else 0
        for batch in islice(batches, _ALONE if workers else None):
            yield encode(batch, tally=total)
        left = list(islice(batches, 1))
        if not left:
            return
        batches = chain(left, batches)

    def rows_of(batch: Batch) -> str:
        return f"rows {name}:{batch[0][0]} to {name}:{batch[-1][0]}"

    def work(batch: Batch) -> tuple[list[Any], Tally]:
        tally = Tally()
        try:
            rows = encode(batch, tally=tally)
            for part in (part for row in rows for part in row.parts):
                part.ids = array("i", part.ids)  # a list is slow to send
            return rows, tally
        except ValueError:
            raise
        except Exception as error:
            raise RuntimeError(f"{rows_of(batch)}: {type(error).__name__}: {said(error, 500)}") from None

    def describe(batch: Batch, what: str) -> str:
        if what == "died":
            fewer = "num_workers: 0" if settings.num_workers else "num_workers: 1"
            cure = f"look for the kernel's out-of-memory killer, or set {fewer}"
            return f"{rows_of(batch)} or the next ones: a process that encodes them died; {cure}"
        return f"{rows_of(batch)}: a process that encodes them {what}"

    found = map_in_processes(work, batches, num_workers=workers, timeout_s=settings.timeout_s, describe=describe)
    with closing(found):
        for rows, tally in found:
            total.add(tally)
            yield rows
