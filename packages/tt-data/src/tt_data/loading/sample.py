"""Some rows of a large source, to check it in seconds: the first, the last, and others at even distances.

A file apart from ``load``: only checks read a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from tt_data.report import SAMPLE_ENDS, SAMPLE_SPREAD
from tt_data.rows.sources import Source
from tt_data.stream.raw import RawStream, to_stream

_READ_WHOLE = 10_000  # rows: a source with no more is read whole


def sampled(source: Source) -> Source:
    """``source`` with a sample of its rows, in their order and with their places; as it is if it is small."""
    stream = to_stream(source)
    count = stream.count()
    if count <= _READ_WHOLE:
        return source
    between = range(SAMPLE_ENDS, count - SAMPLE_ENDS)
    spread = (between[i * len(between) // SAMPLE_SPREAD] for i in range(SAMPLE_SPREAD))
    places = [*range(SAMPLE_ENDS), *spread, *range(count - SAMPLE_ENDS, count)]
    return replace(source, rows=partial(_rows_at, stream, places), sampled_from=count)


def _rows_at(stream: RawStream, places: list[int]) -> Iterator[tuple[int, Any]]:
    wanted = iter(chain(places, (-1,)))
    place = next(wanted)
    for number, (line, raw) in enumerate(stream.open_at(0)):
        if number != place:
            continue
        row = stream.parse(line, raw)
        if row is not None:
            yield line, row
        place = next(wanted)
