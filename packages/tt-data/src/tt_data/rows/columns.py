"""The cells of a row, by our column names: text, turns, or null; and which of them have been read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from tt_data.rows.conversations import messages_or_text
from tt_data.rows.examples import BadRowError
from tt_data.wording import names_of

Row = Mapping[str, Any]
Columns = Mapping[str, str]
_HUGE = 10**4000  # Python writes no longer numbers


class TrackedRow(Mapping[str, Any]):
    """A row that knows which of its columns have been read; asking whether there is one reads nothing."""

    __slots__ = ("_row", "seen")

    def __init__(self, row: Row) -> None:
        self._row, self.seen = row, set[str]()

    def __getitem__(self, name: str) -> Any:
        value = self._row[name]
        self.seen.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def peek(self, name: str) -> Any:
        """The value of a column, which stays unread."""
        return self._row.get(name)

    def unread(self) -> list[str]:
        """The columns that hold something and were not read."""
        return [str(name) for name, value in self._row.items() if name not in self.seen and not is_empty(value)]


def is_empty(value: Any) -> bool:
    """Null, or nothing in it: nothing is lost with it."""
    return value is None or (isinstance(value, (str, list, dict, tuple)) and not value)


def find(row: Row, columns: Columns, *names: str) -> str | None:
    """The row's column for the first of our ``names`` that it has a value for, else that it has at all. Reads none."""
    peek = row.peek if isinstance(row, TrackedRow) else row.get
    first = None
    for name in names:
        theirs = columns.get(name, name)
        if theirs in row:
            if not is_empty(peek(theirs)):
                return theirs
            first = first or theirs
    return first


def optional(row: Row, columns: Columns, *names: str) -> Any:
    """The value of the first of these columns, None if the row has none of them."""
    name = find(row, columns, *names)
    return None if name is None else row[name]


def cell(row: Row, columns: Columns, *names: str) -> Any:
    """The same. Raises BadRowError if the row has none of them."""
    name = find(row, columns, *names)
    if name is None:
        theirs = columns.get(names[0], names[0])
        raise BadRowError("missing column", f"no column {theirs!r}, the row has {names_of(row)}")
    return row[name]


def turns_or_text(row: Row, columns: Columns, *names: str) -> Any:
    """The turns (as a list) or the value of the first of these columns. Raises BadRowError if the row has none."""
    return messages_or_text(cell(row, columns, *names))


def text(row: Row, columns: Columns, *names: str, may_be_empty: bool = False) -> str:
    """The text (or the number, as text) of the first of these columns. Raises BadRowError."""
    value = cell(row, columns, *names)
    if isinstance(value, str) and (may_be_empty or (value and not value.isspace())):
        return value
    return as_text(value, find(row, columns, *names) or names[0], may_be_empty=may_be_empty)


def as_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """``value`` of the column ``name`` as text. Raises BadRowError."""
    if value is None:
        if may_be_empty:
            return ""
        raise BadRowError("null", f"column {name!r} is null")
    if isinstance(value, float) and not isfinite(value):
        raise BadRowError("null", f"column {name!r} is {value}")
    if isinstance(value, (int, float)) and abs(value) < _HUGE:
        return str(value)
    if not isinstance(value, str):
        raise BadRowError("wrong type", f"column {name!r} holds {type(value).__name__}, expected text")
    if not value.strip() and not may_be_empty:
        raise BadRowError("empty", f"column {name!r} is empty")
    return value


def numbers(row: Row, columns: Columns, name: str) -> list[int] | None:
    """The list of whole numbers in a column, None if the row has none. Raises BadRowError."""
    values = optional(row, columns, name)
    if values is None:
        return None
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(v, int) or v in (0.0, 1.0) for v in values):
        raise BadRowError("wrong type", f"column {columns.get(name, name)!r} holds something else than whole numbers")
    return [int(value) for value in values]
