"""Which rows a rank sees at a step: a pure function of (seed, step, rank), in memory that does not grow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

_ROUNDS = 6
_FINEST = 1000  # rows of a round of a mix


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Steps until every row has been seen once; the last one may be short."""
    _check(num_rows, batch_size)
    return -(-num_rows // batch_size)


def rows_at(
    step: int, *, num_rows: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
    shuffle: bool = True,
) -> list[int]:  # fmt: skip
    """This rank's rows of ``step`` (counted from 0). ``batch_size`` counts the rows of one step over all ranks.

    Every row comes exactly once per epoch, in a different order for each epoch; no step holds rows of two epochs.
    """
    _check(num_rows, batch_size)
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    epoch, within = divmod(step, steps_per_epoch(num_rows, batch_size))
    first = within * batch_size
    places = range(first, min(first + batch_size, num_rows))[rank::world_size]
    if not shuffle:
        return list(places)
    permute = Permutation(num_rows, (seed, epoch))
    return [permute(place) for place in places]


def _check(num_rows: int, batch_size: int) -> None:
    if num_rows <= 0:
        raise ValueError(f"num_rows must be positive, got {num_rows}")
    if batch_size <= 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}")


class Permutation:
    """A keyed permutation of ``range(size)``, computed per element: a Feistel network that walks its cycles.

    https://en.wikipedia.org/wiki/Format-preserving_encryption
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self.size = size
        self.half = max(1, -(-(size - 1).bit_length() // 2))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self.keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, place: int) -> int:
        value = self._network(place)
        while value >= self.size:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        half, mask = self.half, (1 << self.half) - 1
        left, right = value >> half, value & mask
        for key in self.keys:
            mixed = ((right + 1) * 0x9E3779B97F4A7C15 ^ key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 ^ mixed) & mask
        return left << half | right


def hash_of(*numbers: int) -> int:
    """One seed of several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def place_in_mix(place: int, size: int, *, first: int, window: range | None, key: tuple[int, ...]) -> int:
    """Which of the ``size`` rows of a block comes at ``place`` in it, for a source that runs on over epochs.

    ``first``: the block's first row, counted over all epochs. ``window``: the rows of this epoch, counted the same way
    (None for the first epoch, whose end may not be known yet). An epoch may hold the end of a block and, a turn later,
    its beginning: so all epochs share one order of the block, and each shuffles only its own stretch of it.
    """
    order = Permutation(size, key)
    if window is None:
        return order(place)
    low, high = max(0, window.start - first), min(size, window.stop - first)
    return order(low + Permutation(high - low, (*key, window.start))(place - low))


def quotas_of(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of ``weights`` (to a thousandth). Raises ValueError for a wrong one."""
    for weight in weights:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"a weight must be a positive number, got {weight!r}")
    shares = [Fraction(weight / sum(weights)).limit_denominator(_FINEST) for weight in weights]
    shares = [max(share, Fraction(1, _FINEST)) for share in shares]
    whole = lcm(*(share.denominator for share in shares))
    if whole > _FINEST:
        whole = _FINEST
    quotas = [max(1, round(share * whole)) for share in shares]
    common = gcd(*quotas)
    return [quota // common for quota in quotas]


def interleave(quotas: Sequence[int]) -> list[int]:
    """The sources of one round, each as often as its quota, spread evenly."""
    places = [((2 * k + 1) / (2 * quota), i) for i, quota in enumerate(quotas) for k in range(quota)]
    return [i for _, i in sorted(places)]
