"""Rows that processes encode.

A file apart from ``encode``: most data sets are encoded in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from tt_data.processes import map_in_processes
from tt_data.report import Tally
from tt_data.rows.schemas import Settings
from tt_data.wording import said

Batch = Sequence[tuple[int, Mapping[str, Any]]]  # line and row


def encode_in_processes(
    encode: Callable[..., list[Any]], batches: Iterator[Batch], name: str, total: Tally, settings: Settings
) -> Generator[list[Any], None, None]:
    """``encode(batch, tally=...)`` for each of ``batches``; ``total`` counts all. A RuntimeError of a process names its
    rows."""

    def rows_of(batch: Batch) -> str:
        return f"rows {name}:{batch[0][0]} to {name}:{batch[-1][0]}"

    def work(batch: Batch) -> tuple[list[Any], Tally]:
        tally = Tally()
        try:
            return encode(batch, tally=tally), tally
        except ValueError:
            raise
        except Exception as error:
            raise RuntimeError(f"{rows_of(batch)}: {type(error).__name__}: {said(error, 500)}") from None

    def describe(batch: Batch, what: str) -> str:
        if what == "died":
            cure = "look for the kernel's out-of-memory killer, or set num_workers: 0"
            return f"{rows_of(batch)} or the next ones: a process that encodes them died; {cure}"
        return f"{rows_of(batch)}: a process that encodes them {what}"

    found = map_in_processes(
        work, batches, num_workers=settings.num_workers, timeout_s=settings.timeout_s, describe=describe
    )
    with closing(found):
        for rows, tally in found:
            total.add(tally)
            yield rows
