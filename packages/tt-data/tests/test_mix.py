"""Mixes: each source as often as its weight says, no row twice per epoch, resumable over epochs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tt_data import batches, load_dataset, steps_per_epoch
from tt_data.batching.loader import Steps
from tt_data.token_rows.order import interleave, quotas_of


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1, 1], [1, 1]),
        ([2, 1, 1], [2, 1, 1]),
        ([0.5], [1]),
        ([70, 30], [7, 3]),
        ([1, 999], [1, 999]),
    ],
)
def test_weights_become_whole_numbers(weights: list[float], quotas: list[int]) -> None:
    assert quotas_of(weights) == quotas


@pytest.mark.parametrize("weights", [[1 / 3, 2 / 3], [0.123, 0.456, 0.421], [3.14159, 2.71828]])
def test_odd_weights_are_met_to_a_thousandth(weights: list[float]) -> None:
    quotas = quotas_of(weights)
    assert sum(quotas) <= 1001
    for weight, quota in zip(weights, quotas, strict=True):
        assert quota / sum(quotas) == pytest.approx(weight / sum(weights), abs=1.5e-3)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "0.5", True, None])
def test_a_wrong_weight_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match="a weight must be a positive number, got"):
        quotas_of([1, weight])


def test_a_round_is_spread_evenly() -> None:
    assert interleave([2, 2]) == [0, 1, 0, 1]
    order = interleave([7, 3])
    assert Counter(order) == {0: 7, 1: 3}
    assert max(order.count(1) for order in [order[i : i + 4] for i in range(7)]) <= 2


@pytest.fixture
def files(write_jsonl: Any) -> list[Path]:
    return [
        write_jsonl([{"text": f"{name} {i}"} for i in range(count)], f"{name}.jsonl")
        for name, count in (("a", 40), ("b", 30))
    ]


def epochs(tokenizer: Any, dataset: Any, rows: int, count: int, **options: Any) -> list[list[str]]:
    steps = steps_per_epoch(rows, 7)
    stream = batches(dataset, batch_size=7, **options)
    return [
        [tokenizer.decode(ids) for batch in islice(stream, steps) for ids in batch["input_ids"].tolist()]
        for _ in range(count)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_holds_the_shares_and_all_rows_come_in_time(chatml: Any, files: list[Path], streaming: bool) -> None:
    mix = load_dataset(
        {files[0]: 0.7, files[1]: 0.3}, chatml, streaming=streaming, **({"buffer": 16} if streaming else {})
    )
    rows = mix.count_rows() if streaming else len(mix)
    assert rows == 50  # 5 rounds of 7 + 3: a sixth would need 42 rows of a
    found = epochs(chatml, mix, rows, 7)
    for texts in found:
        shares = Counter(text[0] for text in texts)
        assert shares == {"a": 35, "b": 15}
    assert len(set(found[0])) == 50
    assert len({text for texts in found[:2] for text in texts if text[0] == "b"}) == 30
    counts = Counter(text for texts in found for text in texts)
    assert len(counts) == 70
    assert max(counts[text] for text in counts if text[0] == "a") - min(counts[t] for t in counts if t[0] == "a") <= 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mix_is_resumed_anywhere(chatml: Any, files: list[Path], streaming: bool) -> None:
    def load() -> Any:
        return load_dataset(
            {files[0]: 0.7, files[1]: 0.3}, chatml, streaming=streaming, **({"buffer": 16} if streaming else {})
        )

    for world in (1, 2):
        for rank in range(world):
            options: dict[str, Any] = {"batch_size": 7, "rank": rank, "world_size": world, "seed": 4}
            whole = [batch["input_ids"].tolist() for batch in islice(batches(load(), **options), 25)]
            for start in (1, 7, 8, 15, 16, 22):
                resumed = islice(batches(load(), start_step=start, **options), 3)
                assert [batch["input_ids"].tolist() for batch in resumed] == whole[start : start + 3]


def test_seeds_change_what_comes_when(chatml: Any, files: list[Path]) -> None:
    first, second = (load_dataset({files[0]: 1, files[1]: 1}, chatml, seed=seed) for seed in (0, 1))
    assert [first.source_of(i) for i in range(20)] != [second.source_of(i) for i in range(20)]
    assert first.fingerprint != second.fingerprint


def test_a_mix_reports_its_sources(chatml: Any, files: list[Path]) -> None:
    mix = load_dataset({files[0]: 0.7, str(files[1]): 0.3}, chatml)
    assert mix.report["sources"] == {
        files[0]: {"rows": 40, "per_epoch": 35},
        str(files[1]): {"rows": 30, "per_epoch": 15},
    }
    assert mix.report["rows"] == 50
    source, row = mix.source_of(3)
    assert mix.where(3) == mix.parts[source].where(row)
    assert mix.rendered(3) == mix.parts[source].rendered(row)
    assert mix[3] == mix.parts[source][row]
    assert mix.length(3) == len(mix[3]["input_ids"])
    assert not mix.is_truncated(3)
    assert mix.documents(3) == [mix.rendered(3)]
    with pytest.raises(IndexError):
        mix[50]


def test_packed_sources_are_mixed_by_packs(chatml: Any, files: list[Path]) -> None:
    mix = load_dataset({files[0]: 0.5, files[1]: 0.5}, chatml, packing=True, max_seq_len=16)
    assert "position_ids" in mix[0]
    assert Counter(mix.source_of(i)[0] for i in range(len(mix))) == {0: len(mix) // 2, 1: len(mix) // 2}


def test_too_few_rows_for_a_round_are_refused(chatml: Any, files: list[Path]) -> None:
    with pytest.raises(
        ValueError, match=r"b.jsonl: 30 rows, too few for one round of the mix \[1, 999\]; round the weights"
    ):
        load_dataset({files[0]: 0.001, files[1]: 0.999}, chatml)
    with pytest.raises(ValueError, match="no whole round of rows"):
        next(batches(load_dataset({files[0]: 0.001, files[1]: 0.999}, chatml, streaming=True), batch_size=2))


def test_places_follow_the_epoch(chatml: Any, files: list[Path]) -> None:
    """In the second epoch a mix holds other rows: an error must not name those of the first."""
    mix = load_dataset({files[0]: 0.7, files[1]: 0.3}, chatml)
    for epoch in range(3):
        for i in (0, 7, 49):
            source, row = mix.source_of(i, epoch)
            assert mix.where(i, epoch) == mix.parts[source].where(row)
            assert mix.at(i, epoch) == mix.parts[source][row]
    steps = Steps(mix, batch_size=10, seed=0, rank=0, world_size=1, shuffle=False, micro_batch_size=None, pad_id=0)
    assert steps.places(6).startswith(mix.where(10, 1))
    assert mix.where(10, 1) != mix.where(10, 0)
