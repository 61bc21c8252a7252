"""Padding."""

from __future__ import annotations

import pytest
import torch

from tt_data import collate, padded_collate, padded_collate_dpo


def test_rows_are_padded_on_the_right() -> None:
    batch = collate([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "labels"}


def test_padding_behind_packs_is_a_document_of_its_own() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "position_ids": [0, 1, 0]},
        {"input_ids": [4], "labels": [-100], "position_ids": [0]},
    ]
    assert collate(rows, pad_id=0)["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_preference_rows_keep_their_sides() -> None:
    row = {"chosen_input_ids": [1, 2], "chosen_labels": [-100, 2], "rejected_input_ids": [1], "rejected_labels": [-100]}
    other = {
        "chosen_input_ids": [3],
        "chosen_labels": [3],
        "rejected_input_ids": [4, 5, 6],
        "rejected_labels": [-100, 5, 6],
    }
    batch = collate([row, other], pad_id=7)
    assert batch["chosen_input_ids"].tolist() == [[1, 2], [3, 7]]
    assert batch["rejected_labels"].tolist() == [[-100, -100, -100], [-100, 5, 6]]
    ids, labels = padded_collate_dpo([row, other], padding_idx=7, ignore_idx=-1)
    assert ids.tolist() == [[1, 2, 7], [3, 7, 7], [1, 7, 7], [4, 5, 6]]
    assert labels.tolist() == [[-100, 2, -1], [3, -1, -1], [-100, -1, -1], [-100, 5, 6]]


def test_judgements_become_bools() -> None:
    rows = [{"input_ids": [1], "labels": [1], "desirable": value} for value in (True, False)]
    assert collate(rows, pad_id=0)["desirable"].tolist() == [True, False]


def test_pairs_are_padded_to_the_longest_of_ids_and_labels() -> None:
    ids, labels = padded_collate([([1, 2, 3], [4, 5, 6]), ([7], [8])], padding_idx=0, ignore_idx=-100)
    assert ids.tolist() == [[1, 2, 3], [7, 0, 0]]
    assert labels.tolist() == [[4, 5, 6], [8, -100, -100]]
    ids, labels = padded_collate([([1], [2, 3])])
    assert ids.tolist() == [[1, 0]]
    assert labels.tolist() == [[2, 3]]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        collate([], pad_id=0)
