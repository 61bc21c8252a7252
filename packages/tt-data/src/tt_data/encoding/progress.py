"""How many rows have been encoded, for a caller that shows it.

A file apart from ``encode``: it counts rows that have not been read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from tt_data.report import SAMPLE_ENDS, SAMPLE_SPREAD, Tally
from tt_data.rows.counts import quick_count
from tt_data.rows.schemas import Settings
from tt_data.rows.sources import Source

T = TypeVar("T")
_COUNTED = 1 << 30  # bytes of lines that are counted in about a second


def watched(work: Iterable[T], tally: Tally, sources: Sequence[Source], settings: Settings) -> Iterator[T]:
    """What ``work`` yields, with a call of ``settings.progress`` for each."""
    assert settings.progress is not None
    count = partial(count_all, sources, limit=settings.limit)
    for found in work:
        settings.progress(tally.seen, count)
        yield found


def count_all(sources: Sequence[Source], *, limit: int | None = None) -> float | None:
    """The rows of all ``sources``, at most ``limit``: an int, or a float if it is an estimate. None if only reading
    them would tell."""
    total: float = 0
    for source in sources:
        sample = 2 * SAMPLE_ENDS + SAMPLE_SPREAD if source.sampled_from else None
        count = sample or quick_count(source, exact_bytes=_COUNTED // len(sources))
        if count is None:
            return limit
        total += count
    return total if limit is None else min(total, limit)
