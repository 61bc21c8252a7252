"""The prompt of one judged row with the answer of another, never its own, whatever the batch size is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tt_data import batches, load_dataset, show, stats
from tt_data.template.spans import Encoded
from tt_data.token_rows.mismatched import mismatched

ROWS = [{"prompt": f"question {i} ", "completion": f"the answer {i} cat", "label": i % 3 == 0} for i in range(13)]


def texts(tokenizer: Any, batch: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The prompt and the answer of each answer id."""
    found = []
    ids, labels, answers = (batch[f"{prefix}{name}"] for name in ("input_ids", "labels", "answer_ids"))
    for answer in range(int(answers.max()) + 1):
        mine = answers == answer
        parts = (ids[mine & (labels == -100)], ids[mine & (labels != -100)])
        found.append(tuple(tokenizer.decode(part.tolist()).strip() for part in parts))
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 13])
def test_every_mismatched_answer_is_that_of_another_row_at_any_batch_size(
    chatml: Any, size: int, packing: bool, streaming: bool
) -> None:
    dataset = load_dataset(ROWS, chatml, max_seq_len=64, packing=packing, streaming=streaming)
    made = batches(dataset, batch_size=size, shuffle=False)
    seen: dict[str, str] = {}
    while len(seen) < len(ROWS):
        batch = next(made)
        for (prompt, answer), (kl_prompt, kl_answer) in zip(
            texts(chatml, batch), texts(chatml, batch, "kl_"), strict=True
        ):
            assert kl_prompt == prompt
            assert kl_answer != answer
            assert kl_answer in {row["completion"] for row in ROWS}
            seen[prompt] = kl_answer
    assert len(set(seen.values())) > 4
    assert seen == partners(chatml, packing=packing, streaming=streaming, size=5)  # not of its batch


def partners(tokenizer: Any, *, size: int, seed: int = 0, **options: Any) -> dict[str, str]:
    dataset = load_dataset(ROWS, tokenizer, max_seq_len=64, seed=seed, **options)
    made = batches(dataset, batch_size=size, shuffle=False, seed=seed)
    found: dict[str, str] = {}
    while len(found) < len(ROWS):
        batch = next(made)
        found |= dict(texts(tokenizer, batch, "kl_"))
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_the_seed_draws_the_mismatched_answers_and_packing_does_not(chatml: Any, streaming: bool) -> None:
    first = partners(chatml, size=4, streaming=streaming)
    assert first == partners(chatml, size=2, streaming=streaming, packing=True)
    assert first != partners(chatml, size=4, seed=1, streaming=streaming)


def test_an_index_of_packs_is_that_of_its_seed(chatml: Any, tmp_path: Path) -> None:
    """Another seed draws answers of other lengths, and so other packs: their count must not come from the disk."""
    lines = (json.dumps({**row, "completion": "cat " * (i % 9 + 1)}) + "\n" for i, row in enumerate(ROWS))
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    options: dict[str, Any] = {"max_seq_len": 24, "packing": True, "streaming": True}
    for seed in range(6):
        for _ in range(2):  # the second time with the index of the first
            kept = load_dataset(tmp_path / "rows.jsonl", chatml, seed=seed, cache_dir=tmp_path, **options)
            plain = load_dataset(tmp_path / "rows.jsonl", chatml, seed=seed, **options)
            found, wanted = batches(kept, batch_size=2, seed=9), batches(plain, batch_size=2, seed=9)
            for _ in range(12):
                assert next(found)["input_ids"].tolist() == next(wanted)["input_ids"].tolist()
    assert len({*tmp_path.glob("*-packs.json")}) == 6


def test_another_prompt_and_another_answer_are_preferred(chatml: Any) -> None:
    """Two rows of one prompt, or many with one answer, would give a row that somebody did write."""
    rows = [
        {"prompt": f"question {i // 2} ", "completion": ("yes it is", "no it is not", "why")[i % 3], "label": True}
        for i in range(40)
    ]
    dataset = load_dataset(rows, chatml)
    for i, row in enumerate(dataset):
        answer = chatml.decode([label for label in row["kl_labels"] if label != -100]).strip()
        assert answer != rows[i]["completion"]
    own = Encoded([1, 2, 3], [(1, 3)])
    rare = [own] * 99 + [Encoded([1, 7, 8], [(1, 3)])]
    assert mismatched(own, rare.__getitem__, 100, key=(0,), max_seq_len=None).ids == [1, 7, 8]
    assert mismatched(own, rare.__getitem__, 99, key=(0,), max_seq_len=None).ids == [1, 2, 3]  # nothing else is said


def test_mismatched_answers_keep_their_masks_and_are_cut_at_max_seq_len() -> None:
    own, other = Encoded([1, 2, 3, 9], [(2, 3)]), Encoded([5, 6, 7, 8], [(1, 2), (3, 4)])
    assert mismatched(own, [other].__getitem__, 1, key=(0,), max_seq_len=None) == Encoded(
        [1, 2, 6, 7, 8], [(2, 3), (4, 5)]
    )
    assert mismatched(own, [other].__getitem__, 1, key=(0,), max_seq_len=3) == Encoded([1, 2, 6], [(2, 3)])


def test_no_pack_is_too_long_with_mismatched_answers_of_any_length(chatml: Any) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"a {i} ", "completion": "the cat " * rng.randint(1, 12), "label": True} for i in range(60)]
    for streaming in (False, True):
        dataset = load_dataset(rows, chatml, max_seq_len=40, packing=True, streaming=streaming)
        batch = next(batches(dataset, batch_size=30))
        assert max(batch["input_ids"].shape[1], batch["kl_input_ids"].shape[1]) <= 40
        assert 0 < dataset.report["efficiency"] <= 1


def test_one_judged_row_has_no_other_answer(chatml: Any) -> None:
    assert set(load_dataset(ROWS[:1], chatml)[0]) == {"input_ids", "labels", "desirable"}


def test_shown_figures_leave_mismatched_answers_out(chatml: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    dataset = load_dataset(tmp_path / "rows.jsonl", chatml)
    (sample,) = show(dataset, limit=1)
    assert sample["tokens"] == len(dataset[0]["input_ids"])
    assert len(sample["documents"]) == len(sample["names"]) == 1
    assert stats(dataset)["tokens"] == sum(len(row["input_ids"]) for row in dataset)
    again = load_dataset(tmp_path / "rows.jsonl", chatml, cache_dir=tmp_path, max_seq_len=16)
    cached = load_dataset(tmp_path / "rows.jsonl", chatml, cache_dir=tmp_path, max_seq_len=16)
    assert [*again] == [*cached]
