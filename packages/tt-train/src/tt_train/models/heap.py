"""The heap of glibc, which keeps what its neighbours in use do not let it give back or use again.

``tt_train.models.trace`` is the only user: it replays a step's allocations here, to find how far the heap grows. From
glibc's malloc.c (2.36): the smallest free chunk that is large enough is taken, neighbours that are free are joined, the
top is given back if it is large. Torch asks for aligned memory, so a chunk must have room to spare: a hole in which a
tensor was is too small for the next one of that size.
"""

from bisect import bisect_left, insort

MAPPED = 2**25  # bytes from which a chunk is mapped on its own, once as large a one was freed
_ALIGNMENT, _HEADER, _LEAST = 64, 16, 32
_TRIMMED = 2 * MAPPED  # a larger free top is given back


class Heap:
    """``size``: its bytes, all of which have been written to."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (size, start), the smallest first
        self._starts: dict[int, int] = {}  # of free chunks: start -> size
        self._ends: dict[int, int] = {}  # end -> start
        self._used: dict[int, tuple[int, int]] = {}  # a key of the caller -> (start, size)

    def take(self, key: int, nbytes: int) -> None:
        """Give ``key`` a chunk."""
        size = -(-(nbytes + _HEADER) // _HEADER) * _HEADER
        found = bisect_left(self._free, (size + _ALIGNMENT + _LEAST, 0))
        if found < len(self._free):
            room, start = self._free[found]
            self._drop(start)
        else:  # the top grows
            start = self._ends.get(self.size, self.size)
            if start < self.size:
                self._drop(start)
            room = size + _ALIGNMENT + _LEAST
            self.size = start + room
        aligned = -(-(start + _HEADER) // _ALIGNMENT) * _ALIGNMENT - _HEADER
        if 0 < aligned - start < _LEAST:
            aligned += _ALIGNMENT
        self._used[key] = aligned, size
        self._give(start, aligned - start)
        self._give(aligned + size, start + room - aligned - size)

    def free(self, key: int) -> None:
        """Take back the chunk of ``key``."""
        self._give(*self._used.pop(key))
        top = self._ends.get(self.size, self.size)
        if self.size - top > _TRIMMED:
            self._drop(top)
            self.size = top

    def _give(self, start: int, size: int) -> None:
        if not size:
            return
        if (before := self._ends.get(start)) is not None:
            size += self._drop(before)
            start = before
        if start + size in self._starts:
            size += self._drop(start + size)
        self._starts[start], self._ends[start + size] = size, start
        insort(self._free, (size, start))

    def _drop(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._free[bisect_left(self._free, (size, start))]
        return size
