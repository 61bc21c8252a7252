"""Padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tt_data import collate, load_dataset, load_tokenizer, padded_collate, padded_collate_dpo
from tt_data.batching.collate import without_loss


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


@pytest.mark.parametrize("packing", [False, True])
def test_an_end_token_that_pads_too_is_trained_where_it_ends_an_answer(
    tmp_path: Path, make_model: Any, packing: bool
) -> None:
    """Its id is 0, which is not the absence of one; padding is known by its place, not by its id."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<e>{% endfor %}"
    model = make_model(tmp_path / "model", ["<e>"], eos_token="<e>", pad_token="<e>", chat_template=template)
    tokenizer = load_tokenizer(model)
    assert (tokenizer.pad_id, tokenizer.eos_ids) == (0, (0,))
    answers = ["the cat", "the cat sat on a mat and hello world"]
    rows = [{"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": a}]} for a in answers]
    dataset = load_dataset(rows, tokenizer, packing=packing, max_seq_len=64)
    batch = collate([dataset[i] for i in range(len(dataset))], pad_id=tokenizer.pad_id)
    trained = batch["labels"][batch["labels"] != -100].tolist()
    assert trained.count(0) == 2  # one of each answer, and none of the padding or the questions
    assert all(tokenizer.decode(trained, skip_special=False).count(f"{a}<e>") == 1 for a in answers)


def test_preference_rows_keep_their_sides() -> None:
    row = {"chosen_input_ids": [1, 2], "chosen_labels": [-100, 2], "rejected_input_ids": [1], "rejected_labels": [-100]}
    other = {
        "chosen_input_ids": [3],
        "chosen_labels": [3],
        "rejected_input_ids": [4, 5, 6],
        "rejected_labels": [-100, 5, 6],
    }
    batch = collate([row, other], pad_id=7)
    assert batch["input_ids"].tolist() == [[1, 2, 7], [1, 7, 7], [3, 7, 7], [4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, -100, -100], [3, -100, -100], [-100, 5, 6]]
    assert batch["answer_ids"].tolist() == [[0, 0, -1], [1, -1, -1], [2, -1, -1], [3, 3, 3]]
    assert set(batch) == {"input_ids", "labels", "answer_ids"}
    ids, labels = padded_collate_dpo([row, other], padding_idx=7, ignore_idx=-1)
    assert ids.tolist() == [[1, 2, 7], [3, 7, 7], [1, 7, 7], [4, 5, 6]]
    assert labels.tolist() == [[-100, 2, -1], [3, -1, -1], [-100, -1, -1], [-100, 5, 6]]


def test_judgements_become_bools() -> None:
    rows = [{"input_ids": [1], "labels": [1], "desirable": value} for value in (True, False)]
    batch = collate(rows, pad_id=0)
    assert batch["desirable"].tolist() == [True, False]
    assert batch["answer_ids"].tolist() == [[0], [1]]


def test_a_pack_of_pairs_is_one_row_whose_tokens_know_their_answers() -> None:
    """The offsets count the tokens of the chosen side before those of the rejected one: no boundary is lost."""
    packs = [
        {"chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, -100], "chosen_position_ids": [0, 1, 0],
         "rejected_input_ids": [1, 4, 5, 3], "rejected_labels": [-100, 4, 5, -100],
         "rejected_position_ids": [0, 1, 2, 0],
         "reference_log_probs": [-1.0, -2.0, -3.0, -4.0]},
        {"chosen_input_ids": [6, 7], "chosen_labels": [-100, 7], "chosen_position_ids": [0, 1],
         "rejected_input_ids": [6, 8], "rejected_labels": [-100, 8], "rejected_position_ids": [0, 1],
         "reference_log_probs": [-5.0, -6.0]},
    ]  # fmt: skip
    batch = collate(packs, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 4, 5, 3], [6, 7, 6, 8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100, 4, 5, -100], [-100, 7, -100, 8, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1, 2]]
    assert batch["answer_ids"].tolist() == [[0, 0, 2, 1, 1, 1, 3], [4, 4, 5, 5, -1, -1, -1]]
    assert batch["reference_log_probs"].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert batch["reference_log_probs"].dtype == torch.float32


def test_a_pack_of_judged_answers_has_a_judgement_for_each() -> None:
    packs = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "position_ids": [0, 1, 0], "desirable": [True, False],
         "kl_input_ids": [1, 5, 3, 5], "kl_labels": [-100, 5, -100, 5], "kl_position_ids": [0, 1, 0, 1]},
        {"input_ids": [4, 5], "labels": [-100, 5], "position_ids": [0, 1], "desirable": [True],
         "kl_input_ids": [4, 2], "kl_labels": [-100, 2], "kl_position_ids": [0, 1]},
    ]  # fmt: skip
    batch = collate(packs, pad_id=0)
    assert batch["desirable"].tolist() == [True, False, True]
    assert batch["answer_ids"].tolist() == [[0, 0, 1], [2, 2, -1]]
    assert batch["kl_input_ids"].tolist() == [[1, 5, 3, 5], [4, 2, 0, 0]]
    assert batch["kl_answer_ids"].tolist() == [[0, 0, 1, 1], [2, 2, -1, -1]]
    assert batch["kl_position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["single", "pair", "judged"])
def test_a_batch_without_loss_has_the_same_keys_and_no_answer(kind: str, packed: bool) -> None:
    sides = ("chosen_", "rejected_") if kind == "pair" else ("",)
    row: dict[str, Any] = {}
    for side in sides:
        row |= {f"{side}input_ids": [1, 2, 3], f"{side}labels": [-100, 2, 3]}
        row |= {f"{side}position_ids": [0, 1, 2]} if packed else {}
    if kind != "single":
        row["reference_log_probs"] = [-1.0, -2.0][: len(sides)]
    if kind == "judged":
        row |= {f"kl_{key}": value for key, value in row.items()}
        row["desirable"] = [True] if packed else True
    batch, empty = collate([row], pad_id=0), without_loss(row, pad_id=0)
    assert batch.keys() == empty.keys()
    assert (empty["labels"] == -100).all()
    assert kind == "single" or (empty["answer_ids"] == -1).all()
    assert kind != "judged" or ((empty["kl_labels"] == -100) & (empty["kl_answer_ids"] == -1)).all()
    assert all(len(empty[key]) == 0 for key in ("desirable", "reference_log_probs") if key in empty)


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
