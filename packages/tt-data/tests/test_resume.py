"""Stopped anywhere and begun again: no row twice, none left out, in whatever way the rows are loaded."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tt_data import batches, load_dataset, steps_per_epoch

BATCH, EPOCHS, POINTS = 5, 3, 50
COUNTS = {"a": 41, "b": 29}
PACKED = {"packing": True, "max_seq_len": 20}
STREAM = {"streaming": True, "buffer": 7}
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {  # of one source or a mix, and how they are loaded
    "map": (False, {}),
    "packed": (False, PACKED),
    "stream": (False, STREAM),
    "packed stream": (False, PACKED | STREAM),
    "mix": (True, {}),
    "packed mix": (True, PACKED),
    "streamed mix": (True, STREAM),
    "packed and streamed mix": (True, PACKED | STREAM),
}
Step = list[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in COUNTS.items():
        rows = ({"text": f"{name} {i}" + " cat" * (i % 6)} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in COUNTS}


def texts(tokenizer: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Every document of a batch that gives loss."""
    found = []
    positions = batch.get("position_ids")
    for row, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        starts = [0] if positions is None else [i for i, p in enumerate(positions[row].tolist()) if p == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if max(labels[start:end]) >= 0:
                found.append(tokenizer.decode([i for i in ids[start:end] if i != tokenizer.pad_id]))
    return found


def steps_of_an_epoch(dataset: Any) -> int:
    if hasattr(dataset, "__len__"):
        return steps_per_epoch(len(dataset), BATCH)
    if hasattr(dataset, "count_rows"):
        return steps_per_epoch(dataset.count_rows(), BATCH)
    steps = 0
    while dataset.locate(steps, BATCH, seed=3)[0] == 0:
        steps += 1
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_random_points(chatml: Any, files: dict[str, Path], kind: str) -> None:
    """1, 2 and 4 ranks, 0 and 2 workers, the edges of epochs and the second and third epoch among them."""
    mixed, options = KINDS[kind]
    source: Any = {files["a"]: 0.6, files["b"]: 0.4} if mixed else files["a"]

    def run(rank: int, world: int, start: int, count: int, num_workers: int = 0) -> list[Step]:
        found = batches(
            load_dataset(source, chatml, **options), batch_size=BATCH, seed=3, rank=rank, world_size=world,
            start_step=start, num_workers=num_workers,
        )  # fmt: skip
        return [texts(chatml, batch) for batch in islice(found, count)]

    per_epoch = steps_of_an_epoch(load_dataset(source, chatml, **options))
    total = EPOCHS * per_epoch + 2
    whole = {world: [run(rank, world, 0, total) for rank in range(world)] for world in (1, 2, 4)}
    for world in (2, 4):  # the ranks share what one device sees
        for step in range(total):
            assert sorted(text for rank in whole[world] for text in rank[step]) == sorted(whole[1][0][step])
    epochs = [[t for step in whole[1][0][e * per_epoch : (e + 1) * per_epoch] for t in step] for e in range(EPOCHS)]
    _no_row_twice_or_never(epochs, mixed)
    rng = random.Random(kind)
    edges = [e * per_epoch + d for e in (1, 2) for d in (-1, 0, 1)]
    for number, start in enumerate([*edges, *(rng.randrange(total - 2) for _ in range(POINTS - len(edges)))]):
        world = rng.choice([1, 2, 4])
        rank = rng.randrange(world)
        resumed = run(rank, world, start, 3, num_workers=2 if number % 3 == 1 else 0)
        assert resumed == whole[world][rank][start : start + 3], (start, rank, world)


def _no_row_twice_or_never(epochs: list[Step], mixed: bool) -> None:
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1
        if not mixed:
            assert len(epoch) == COUNTS["a"]
    seen = Counter(text for epoch in epochs for text in epoch)
    for name, count in COUNTS.items() if mixed else [("a", COUNTS["a"])]:
        times = [seen[text] for text in seen if text.startswith(name)]
        assert len(times) == count  # what an epoch leaves out comes in the next
        assert max(times) - min(times) <= 1


def test_a_hundred_thousand_steps_on_costs_no_more_than_the_next(chatml: Any, files: dict[str, Path]) -> None:
    for mixed, options in KINDS.values():
        source: Any = {files["a"]: 0.6, files["b"]: 0.4} if mixed else files["a"]
        load = partial(load_dataset, source, chatml, **options)
        one = next(batches(load(), batch_size=BATCH, start_step=100_000))
        other = next(batches(load(), batch_size=BATCH, start_step=100_000))
        assert torch.equal(one["input_ids"], other["input_ids"])
