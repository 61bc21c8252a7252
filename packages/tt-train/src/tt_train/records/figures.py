"""The figures of many steps, 8 bytes each: a run of a million steps has a dozen million of them.

A file apart from ``run_files``: the report and the end of a run keep them, who reads rows one by one does not.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import overload

Row = dict[str, float | None]
_NONE = float("nan")  # a figure that is not finite is None anyway


class Figures(Sequence[Row]):
    """Rows of figures, kept as columns. A row is a dict only while it is looked at; a slice keeps columns."""

    def __init__(self, rows: Iterable[Mapping[str, float | None]] = ()) -> None:
        self.columns: dict[str, array[float]] = {}
        self._size = 0
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, float | None]) -> None:
        """Add a row of finite figures or None; it may have others than the rows before it."""
        for name in row.keys() - self.columns.keys():
            self.columns[name] = array("d", [_NONE]) * self._size
        for name, column in self.columns.items():
            value = row.get(name)
            column.append(_NONE if value is None else value)
        self._size += 1

    def column(self, name: str) -> list[float | None]:
        """One figure of every row."""
        values = self.columns.get(name)
        return [None] * self._size if values is None else [None if value != value else value for value in values]

    def only(self, *names: str) -> "Figures":
        """The same rows with these figures alone."""
        return self._of({name: self.columns[name] for name in names if name in self.columns}, self._size)

    def by_step(self) -> "Figures":
        """Sorted by step. Of several rows of a step the last one counts: a resumed run writes a step again."""
        steps = self.columns.get("step", array("d"))
        if all(before < after for before, after in pairwise(steps)):
            return self
        last = {step: place for place, step in enumerate(steps)}
        places = [last[step] for step in sorted(last)]
        kept = {name: array("d", (column[place] for place in places)) for name, column in self.columns.items()}
        return self._of(kept, len(places))

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "Figures": ...
    def __getitem__(self, place: int | slice) -> "Row | Figures":
        if isinstance(place, slice):
            size = len(range(self._size)[place])
            return self._of({name: column[place] for name, column in self.columns.items()}, size)
        place = range(self._size)[place]  # raises IndexError
        return {name: None if (value := column[place]) != value else value for name, column in self.columns.items()}

    def _of(self, columns: "dict[str, array[float]]", size: int) -> "Figures":
        other = Figures()
        other.columns, other._size = columns, size
        return other
