"""Sources that can be opened in the middle: the raw rows of a stream, counted from 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tt_data.rows.counts import count_lines, count_parquet, has_lines
from tt_data.rows.hub import Part, open_hub, rows_from
from tt_data.rows.json_files import Row, file_kind, lines_of, open_data, parse_line
from tt_data.rows.sources import Source, quick_digest
from tt_data.rows.tables import read_parquet

Raw = tuple[int, Any]  # the line that a message names, and the row, perhaps not parsed yet
_MARK_EVERY = 4096


@dataclass(frozen=True)
class RawStream:
    """``open_at(n)`` yields raw rows from the n-th on; ``parse`` gives the row (None: an empty line)."""

    name: str
    open_at: Callable[[int], Iterator[Raw]]
    parse: Callable[[int, Any], Row | None]
    count: Callable[[], int]
    digest: Callable[[], str]


def to_stream(source: Source) -> RawStream:
    """A source as a stream: jsonl and parquet are opened at any row, other files are read up to it."""
    path, kind = source.path, source.path and file_kind(source.path)
    if path is None:
        return RawStream(source.name, partial(_from, source.rows), _parsed, partial(_count, source.rows), source.digest)
    digest = partial(quick_digest, path)
    if has_lines(path):
        lines = _Lines(path)
        return RawStream(source.name, lines.open_at, partial(_parse, path), partial(count_lines, path), digest)
    if kind == ".parquet":
        return RawStream(source.name, partial(read_parquet, path), _parsed, partial(count_parquet, path), digest)
    return RawStream(source.name, partial(_from, source.rows), _parsed, partial(_count, source.rows), digest)


def _from(rows: Callable[[], Iterator[Raw]], start: int) -> Iterator[Raw]:
    return islice(rows(), start, None)


def _count(rows: Callable[[], Iterator[Raw]]) -> int:
    return sum(1 for _ in rows())


def _parse(path: Path, line: int, raw: bytes) -> Row | None:
    return parse_line(path, line, raw) if raw.strip() else None


def _parsed(line: int, raw: Row) -> Row:
    return raw


class _Lines:
    """The lines of a file, with the place of every 4096th one that has been passed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marks = [0]

    def open_at(self, start: int) -> Iterator[Raw]:
        with open_data(self.path) as stream:
            mark = min(start // _MARK_EVERY, len(self.marks) - 1)
            stream.seek(self.marks[mark])
            number = mark * _MARK_EVERY
            for _, line in lines_of(self.path, stream, number + 1):
                if number >= start:
                    yield number + 1, line
                number += 1
                if number == len(self.marks) * _MARK_EVERY:
                    self.marks.append(stream.tell())


def hub_stream(name: str, part: Part) -> RawStream:
    """A data set of the hub, row by row, without downloading all of it first."""
    found = _HubRows(name, part)
    return RawStream(name, found.open_at, _parsed, found.count, found.digest)


class _HubRows:
    """A streamed data set of the hub. A process opens it again: the object of the library is not sent to it."""

    def __init__(self, name: str, part: Part) -> None:
        self.name, self.part = name, part
        self._found: Any = open_hub(name, part, streaming=True)

    def open_at(self, start: int) -> Iterator[Raw]:
        return rows_from(self.name, self._found.skip(start), start)

    def count(self) -> int:
        info = getattr(self._found.info, "splits", None) or {}
        known = getattr(info.get(str(self._found.split)), "num_examples", None)
        return int(known) if known else sum(1 for _ in self._found)

    def digest(self) -> str:
        checksums = str(getattr(self._found.info, "download_checksums", None))
        return json.dumps([self.name, str(self._found.split), self.part.options(), checksums])

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "part": self.part}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
