"""What is wrong with the files of a run, which may be something in every row of a million."""

from collections.abc import Iterable

_KEPT = 100


class Problems(list[str]):
    """One line for each of the first problems; ``more`` counts the others."""

    more = 0

    def append(self, line: str, /) -> None:
        if len(self) < _KEPT:
            super().append(line)
        else:
            self.more += 1

    def extend(self, lines: Iterable[str], /) -> None:
        for line in lines:
            self.append(line)

    @property
    def total(self) -> int:
        """The number of all problems."""
        return len(self) + self.more
