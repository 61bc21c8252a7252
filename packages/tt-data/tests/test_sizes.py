"""Stores of more than 2**31 tokens: sparse files stand for them, so that they take no room on the disk."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest

from tt_data.stream.packed import PackedStream
from tt_data.template.spans import Encoded, cut
from tt_data.token_rows.dataset import TokenStore, read_numbers, write_numbers
from tt_data.token_rows.order import Permutation, rows_at

BEYOND = 2**31 + 100  # tokens: places do not fit into 32 bits, their bytes not into 33


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Three rows: before, across and behind the 2**31st token; only the last tokens of each are not 0."""
    ends = [5, BEYOND, BEYOND + 4]
    with (tmp_path / "0.ids").open("wb") as stream:
        for end, ids in zip(ends, ([1, 2], [3, 4], [5, 6]), strict=True):
            stream.seek((end - len(ids)) * 4)
            stream.write(array("i", ids).tobytes())
    if (tmp_path / "0.ids").stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no sparse files")
    spans = array("i", [1, 5, BEYOND - 7 - 2**31, 40, 0, 4])
    for name, numbers in (
        ("id_ends", array("q", [0, *ends])),
        ("spans", spans),
        ("span_ends", array("q", [0, 2, 4, 6])),
    ):
        write_numbers(tmp_path / f"0.{name}", numbers)
    return TokenStore.load(tmp_path, "0")


def test_rows_behind_the_2_31st_token_are_read_from_their_place(store: TokenStore) -> None:
    assert len(store) == 3
    assert [store.length(i) for i in range(3)] == [5, BEYOND - 5, 4]
    assert store.get(0).ids == [0, 0, 0, 1, 2]
    assert store.get(2).ids == [0, 0, 5, 6]
    assert store.get(2).trained == [(0, 4)]
    assert store.ids[BEYOND - 1] == 4


def test_places_are_64_bits_while_rows_are_made() -> None:
    store = TokenStore()
    assert (store.id_ends.itemsize, store.span_ends.itemsize) == (8, 8)  # type: ignore[union-attr]
    store.append(Encoded([2**31 - 1], [(0, 1)]))  # the largest id that there can be
    assert store.get(0).ids == [2**31 - 1]


def test_files_above_2_gib_of_other_columns_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "places"
    with path.open("wb") as stream:
        stream.seek((2**28 + 5) * 8)
        stream.write(array("q", [2**40]).tobytes())
    assert os.path.getsize(path) > 2**31
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no sparse files")
    numbers = read_numbers(path, "q")
    assert len(numbers) == 2**28 + 6
    assert numbers[2**28 + 5] == 2**40


def test_the_order_of_rows_is_a_permutation_beyond_32_bits() -> None:
    size = 2**33 + 7
    permute = Permutation(size, (3,))
    places = [0, 1, 2**31 - 1, 2**31, 2**32, 2**33, size - 1]
    found = [permute(place) for place in places]
    assert len(set(found)) == len(places)
    assert all(0 <= row < size for row in found)
    rows = rows_at(2**29, num_rows=size, batch_size=8, seed=1)
    assert len(rows) == len(set(rows)) == 8
    assert max(rows_at(2**30, num_rows=size, batch_size=8, seed=1, shuffle=False)) == 2**33 + 6


def test_packs_of_a_stream_are_found_beyond_2_31() -> None:
    stream = PackedStream.__new__(PackedStream)  # its places follow from the counts alone
    stream._starts = [0, 2**31 + 5, 2**33]
    assert stream.find(2**31 + 4) == (0, 2**31 + 4)
    assert stream.find(2**31 + 5) == (1, 0)
    assert stream.find(2**33 - 1) == (1, 2**33 - 2**31 - 6)


def test_a_long_row_is_cut_where_it_is_told() -> None:
    row = Encoded([0] * 10, [(3, 2**31 + 10)])
    assert cut(row, 5).trained == [(3, 5)]
