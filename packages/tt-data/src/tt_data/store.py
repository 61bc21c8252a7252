"""Token rows in flat arrays: in memory while they are made, mapped from files once they are cached."""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from tt_data.files import open_regular
from tt_data.template.spans import Encoded, Span

IGNORE_INDEX = -100
Numbers: TypeAlias = "array[int] | memoryview[int]"


class TokenStore:
    """Append-only rows; 4 bytes a token, 8 a trained span, whatever the number of rows."""

    ids: Numbers
    id_ends: Numbers
    spans: Numbers
    span_ends: Numbers

    def __init__(self) -> None:
        self.ids, self.id_ends = array("i"), array("q", [0])
        self.spans, self.span_ends = array("i"), array("q", [0])

    def __len__(self) -> int:
        return len(self.id_ends) - 1

    def append(self, row: Encoded) -> None:
        assert isinstance(self.ids, array)
        assert isinstance(self.id_ends, array)
        assert isinstance(self.spans, array)
        assert isinstance(self.span_ends, array)
        self.ids.extend(row.ids)
        self.id_ends.append(len(self.ids))
        for start, end in row.trained:
            self.spans.append(start)
            self.spans.append(end)
        self.span_ends.append(len(self.spans))

    def length(self, i: int) -> int:
        return int(self.id_ends[i + 1] - self.id_ends[i])

    def get_ids(self, i: int) -> list[int]:
        return self.ids[self.id_ends[i] : self.id_ends[i + 1]].tolist()

    def get_spans(self, i: int) -> list[Span]:
        flat = self.spans[self.span_ends[i] : self.span_ends[i + 1]].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def save(self, directory: Path, name: str) -> None:
        """Four files, ``<name>.ids`` and so on."""
        for part in _PARTS:
            write_numbers(directory / f"{name}.{part}", getattr(self, part))

    @classmethod
    def load(cls, directory: Path, name: str) -> TokenStore:
        """The rows that ``save`` wrote, mapped."""
        store = cls()
        for part, kind in _PARTS.items():
            setattr(store, part, read_numbers(directory / f"{name}.{part}", kind))
        for ends, flat in ((store.id_ends, store.ids), (store.span_ends, store.spans)):
            if ends[0] != 0 or ends[-1] != len(flat) or any(a > b for a, b in pairwise(ends)):
                raise ValueError(f"{directory / name}: the rows do not follow one another")
        if len(store.id_ends) != len(store.span_ends):
            raise ValueError(f"{directory / name}: not as many rows as masks")
        return store

    def __getstate__(self) -> dict[str, array[int]]:
        return {part: array(kind, getattr(self, part)) for part, kind in _PARTS.items()}

    def __setstate__(self, state: dict[str, array[int]]) -> None:
        self.__dict__.update(state)


_PARTS = {"ids": "i", "id_ends": "q", "spans": "i", "span_ends": "q"}


def write_numbers(path: Path, numbers: Numbers) -> None:
    """The raw numbers, in this machine's byte order."""
    with path.open("wb") as stream:
        stream.write(memoryview(numbers).cast("B"))


def read_numbers(path: Path, kind: str) -> Numbers:
    """The numbers of a file, mapped: they take memory only where they are read."""
    with open_regular(path) as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return array(kind)
        mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        return mapped.cast("i") if kind == "i" else mapped.cast("q") if kind == "q" else mapped.cast("b")


def labels_of(ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """``ids`` where they are trained, -100 elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels
