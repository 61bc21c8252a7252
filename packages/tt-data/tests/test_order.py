"""Which rows make a step: a pure function, every row once per epoch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tt_data import rows_at, steps_per_epoch
from tt_data.token_rows.order import Permutation, place_in_mix


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 1), (7, 3), (10, 10), (23, 8), (100, 7), (5, 9)])
def test_every_row_once_per_epoch(num_rows: int, batch_size: int, world_size: int, shuffle: bool) -> None:
    steps = steps_per_epoch(num_rows, batch_size)
    assert steps == len(range(0, num_rows, batch_size))
    for epoch in range(3):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            per_rank = [
                rows_at(
                    step,
                    num_rows=num_rows,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    seed=5,
                    shuffle=shuffle,
                )
                for rank in range(world_size)
            ]
            assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1
            seen += [row for rows in per_rank for row in rows]
            assert sum(map(len, per_rank)) == min(batch_size, num_rows - (step - epoch * steps) * batch_size)
        assert sorted(seen) == list(range(num_rows))


def test_ranks_share_the_step_of_one_device() -> None:
    for step in range(40):
        whole = rows_at(step, num_rows=50, batch_size=8, seed=3)
        for world_size in (2, 4):
            ranks = [
                rows_at(step, num_rows=50, batch_size=8, seed=3, rank=r, world_size=world_size)
                for r in range(world_size)
            ]
            assert sorted(row for rows in ranks for row in rows) == sorted(whole)
            assert ranks == [whole[r::world_size] for r in range(world_size)]


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    first = rows_at(0, num_rows=1000, batch_size=1000, seed=0)
    assert first == rows_at(0, num_rows=1000, batch_size=1000, seed=0)
    assert first != rows_at(0, num_rows=1000, batch_size=1000, seed=1)
    assert first != rows_at(1, num_rows=1000, batch_size=1000, seed=0)
    assert [row for step in range(10) for row in rows_at(step, num_rows=1000, batch_size=100, seed=0)] == first
    assert rows_at(0, num_rows=1000, batch_size=5, shuffle=False) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 10_000])
def test_a_permutation_holds_every_number_once(size: int) -> None:
    permute = Permutation(size, (1, 2))
    assert sorted(map(permute, range(size))) == list(range(size))


def test_permutations_are_spread_evenly() -> None:
    """Over 1800 keys, each of 6 orders of 3 rows 300 times, within 5 standard deviations (16 each)."""
    counts: dict[tuple[int, ...], int] = {}
    for key in range(1800):
        permute = Permutation(3, (key,))
        order = tuple(map(permute, range(3)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 300) < 80 for count in counts.values()), counts
    permute = Permutation(100_000, (0,))
    places = [permute(i) for i in range(1000)]
    assert abs(sum(places) / 1000 - 50_000) < 5 * 28_868 / 1000**0.5
    assert sum(abs(a - b) == 1 for a, b in pairwise(places)) < 3


def test_a_step_far_away_costs_no_more() -> None:
    rng = random.Random(0)
    for _ in range(20):
        step = rng.randrange(10**12)
        rows = rows_at(step, num_rows=10**9, batch_size=4)
        assert len(set(rows)) == 4
        assert all(0 <= row < 10**9 for row in rows)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_rows": 0}, "num_rows must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"step": -1}, "step must be at least 0, got -1"),
    ],
)
def test_wrong_numbers_are_refused(change: dict[str, int], text: str) -> None:
    arguments = {"step": 0, "num_rows": 10, "batch_size": 2, **change}
    with pytest.raises(ValueError, match=text):
        rows_at(arguments.pop("step"), **arguments)


@pytest.mark.parametrize("stretch", [1, 3, 7, 10])
def test_a_source_that_runs_on_over_epochs_repeats_no_row_in_one(stretch: int) -> None:
    """Epochs of ``stretch`` rows of 10: each is a stretch of the same circle, shuffled on its own."""
    seen = []
    for epoch in range(30):
        window = range(epoch * stretch, (epoch + 1) * stretch)
        rows = [place_in_mix(n % 10, 10, first=n - n % 10, window=window if epoch else None, key=(5,)) for n in window]
        assert len(set(rows)) == stretch
        seen += rows
    assert all(sorted(seen[turn : turn + 10]) == list(range(10)) for turn in range(0, len(seen) - 9, 10))
    if stretch == 10:
        assert len({tuple(seen[turn : turn + 10]) for turn in range(0, 300, 10)}) > 20
