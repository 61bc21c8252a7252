"""Batches: pure in (seed, step, rank), resumed anywhere, in this process or in others."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tt_data import batches, load_dataset, steps_per_epoch
from tt_data.batching.loader import Steps


def documents(tokenizer: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """Every document of a batch as text."""
    found = []
    for row, ids in enumerate(batch["input_ids"]):
        positions = batch["position_ids"][row] if "position_ids" in batch else torch.arange(len(ids))
        for document in (positions == 0).cumsum(0).unique():
            part = ids[(positions == 0).cumsum(0) == document].tolist()
            text = tokenizer.decode(part)
            if text.strip() and (batch["labels"][row] != -100).any():
                found.append(text)
    return found


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory, make_chat_rows: Any) -> Path:
    import json

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_chat_rows(53)))
    return path


LOADS: dict[str, dict[str, Any]] = {
    "map": {},
    "packed": {"max_seq_len": 64, "packing": True},
    "stream": {"streaming": True, "buffer": 10},
    "packed stream": {"max_seq_len": 64, "packing": True, "streaming": True, "buffer": 10},
}


def _batches(tokenizer: Any, path: Path, kind: str, rank: int, world: int, **arguments: Any) -> Any:
    dataset = load_dataset(path, tokenizer, **LOADS[kind])
    return batches(dataset, batch_size=8, seed=3, rank=rank, world_size=world, **arguments)


@pytest.mark.parametrize("kind", LOADS)
def test_worker_processes_change_nothing(chatml: Any, rows_file: Path, kind: str) -> None:
    alone = list(islice(_batches(chatml, rows_file, kind, 0, 2, start_step=3), 12))
    helped = list(islice(_batches(chatml, rows_file, kind, 0, 2, start_step=3, num_workers=2), 12))
    for one, other in zip(alone, helped, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_micro_batches_hold_the_rows_of_the_step(chatml: Any, rows_file: Path) -> None:
    dataset = load_dataset(rows_file, chatml)
    whole = batches(dataset, batch_size=8)
    for size in (1, 3, 8, 100):
        split = batches(dataset, batch_size=8, micro_batch_size=size)
        for step in range(8):
            micro = next(split)
            assert max(len(part["input_ids"]) for part in micro) <= size
            wanted = documents(chatml, batches_at(dataset, step))
            assert sorted(text for part in micro for text in documents(chatml, part)) == sorted(wanted)
    assert len(next(batches(dataset, batch_size=8, micro_batch_size=3))) == 3
    assert next(whole)["input_ids"].shape[0] == 8


def batches_at(dataset: Any, step: int) -> Any:
    return next(batches(dataset, batch_size=8, start_step=step))


def test_micro_batches_group_rows_of_similar_length(chatml: Any) -> None:
    rows = [{"text": "the cat " * (1 + 10 * (i % 2)) + str(i)} for i in range(8)]
    parts = next(batches(load_dataset(rows, chatml), batch_size=8, micro_batch_size=4))
    padding = [float((part["labels"] == -100).float().mean()) for part in parts]
    assert parts[0]["input_ids"].shape[1] < parts[1]["input_ids"].shape[1] / 4
    assert max(padding) < 0.1


def test_ranks_have_the_same_number_of_micro_batches_in_a_short_step(chatml: Any) -> None:
    """53 rows in steps of 8: the last step has 5 rows, on 4 ranks 2, 1, 1 and 1; with 49 rows three have none."""
    for count in (53, 49):
        rows = [{"text": f"the cat {i}"} for i in range(count)]
        dataset = load_dataset(rows, chatml)
        last = steps_per_epoch(count, 8) - 1
        per_rank = [
            next(batches(dataset, batch_size=8, rank=r, world_size=4, start_step=last, micro_batch_size=1))
            for r in range(4)
        ]
        assert len({len(parts) for parts in per_rank}) == 1
        with_loss = sum(int((part["labels"] != -100).any()) for parts in per_rank for part in parts)
        assert with_loss == count - last * 8
        empty = next(batches(dataset, batch_size=8, rank=3, world_size=4, start_step=last))
        assert bool((empty["labels"] != -100).any()) == (count == 53)


def test_a_stream_gives_ranks_without_rows_a_batch_too(chatml: Any) -> None:
    rows = [{"prompt": f"a {i}", "chosen": "b", "rejected": "c"} for i in range(9)]
    dataset = load_dataset(rows, chatml, streaming=True)
    last = [next(batches(dataset, batch_size=8, rank=r, world_size=2, start_step=1)) for r in range(2)]
    assert last[0].keys() == last[1].keys()
    assert (last[0]["labels"] != -100).any()
    assert (last[1]["labels"] == -100).all()
    assert (last[1]["answer_ids"] == -1).all()  # no pair, which would count with a loss of ln 2


def test_seed_shuffle_and_pad_have_an_effect(chatml: Any, rows_file: Path) -> None:
    dataset = load_dataset(rows_file, chatml)
    first = documents(chatml, next(batches(dataset, batch_size=8, shuffle=False)))
    assert first == [chatml.decode(dataset[i]["input_ids"]) for i in range(8)]
    assert documents(chatml, next(batches(dataset, batch_size=8, seed=1))) != documents(
        chatml, next(batches(dataset, batch_size=8, seed=2))
    )
    padded = next(batches(load_dataset([{"text": "a"}, {"text": "the cat"}], chatml), batch_size=2, pad_id=7))
    assert (padded["input_ids"] == 7).any()
    stream = load_dataset(rows_file, chatml, streaming=True, buffer=20)
    assert documents(chatml, next(batches(stream, batch_size=8, shuffle=False))) == first
    assert documents(chatml, next(batches(stream, batch_size=8))) != first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"rank": 1}, r"rank must be in \[0, 1\), got 1"),
        ({"start_step": -1}, "start_step must be at least 0"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
    ],
)
def test_wrong_arguments_are_refused_at_once(chatml: Any, arguments: dict[str, Any], text: str) -> None:
    dataset = load_dataset([{"text": "a"}], chatml)
    with pytest.raises(ValueError, match=text):
        batches(dataset, **{"batch_size": 1, **arguments})


def test_workers_are_refused_where_they_cannot_be_forked(chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    dataset = load_dataset([{"text": "a"}], chatml)
    with pytest.raises(ValueError, match="num_workers: this system cannot fork processes; set num_workers: 0"):
        next(batches(dataset, batch_size=1, num_workers=1))
    with pytest.raises(ValueError, match="cannot fork"):
        load_dataset([{"text": "a"}], chatml, num_workers=1)


class Troubled:
    """Rows of which some make a worker fail, hang or die."""

    pad_id = 0

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return 16

    def where(self, i: int) -> str:
        return f"rows.jsonl:{i + 1}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 9 and self.trouble == "fail":
            raise KeyError("nine")
        if i == 9 and self.trouble == "hang":
            time.sleep(8)
        if i == 9 and self.trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 4 and self.trouble == "die in the middle":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.trouble in ("die in the middle", "large"):
            return {"input_ids": [1] * 100_000, "labels": [1] * 100_000}
        return {"input_ids": [1, 2], "labels": [1, 2]}


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("fail", "step 2, rows rows.jsonl:9, rows.jsonl:10, rows.jsonl:11, ...: KeyError: 'nine'"),
        ("hang", "step 2: a data worker did not answer within 3 s while it prepared the rows rows.jsonl:9, "),
        ("die", "a data worker died while it prepared the rows rows.jsonl:"),
    ],
)
def test_a_worker_in_trouble_is_an_error_that_names_its_rows(trouble: str, text: str) -> None:
    patience = 3 if trouble == "hang" else 60  # on a busy machine a process may take a while to die
    stream = batches(Troubled(trouble), batch_size=4, num_workers=2, shuffle=False, timeout_s=patience)
    with pytest.raises(RuntimeError) as failure:
        list(islice(stream, 4))
    assert text in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_worker_that_dies_while_it_hands_over_a_batch_disturbs_nobody_until_then() -> None:
    """Its parent may be in the middle of a save: the error comes from next(), and from nowhere else."""
    stream = batches(Troubled("die in the middle"), batch_size=4, num_workers=1, shuffle=False, timeout_s=60)
    next(stream)
    (worker,) = multiprocessing.active_children()
    worker.join(60)  # it filled the pipe with a part of the batch of rows 5 to 8, and was killed
    assert not worker.is_alive()
    with pytest.raises(RuntimeError, match="step 1: a data worker died while it prepared the rows rows.jsonl:5, "):
        next(stream)
    assert not multiprocessing.active_children()


def test_workers_go_with_their_loader() -> None:
    stream = batches(Troubled("none"), batch_size=4, num_workers=3, shuffle=False)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 3
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGINT)  # Ctrl-C reaches them too: whether to go on is their parent's decision
    assert next(stream)["input_ids"].shape == (4, 2)
    stream.close()
    assert not multiprocessing.active_children()


def test_a_fork_of_the_parent_leaves_the_workers_alone() -> None:
    stream = batches(Troubled("none"), batch_size=4, num_workers=2, shuffle=False)
    next(stream)
    child = os.fork()
    if child == 0:
        stream.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [len(batch["labels"]) for batch in islice(stream, 20)] == [4] * 20
    stream.close()


def test_workers_end_when_their_parent_is_killed() -> None:
    """Three that wait for the parent to take a batch: none stays behind."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(reading)
        stream = batches(Troubled("large"), batch_size=4, num_workers=3, shuffle=False)
        next(stream)
        os.write(writing, b"ready")
        time.sleep(60)
        os._exit(0)
    os.close(writing)  # the parent and its workers hold the other end, until the last of them is gone
    try:
        assert os.read(reading, 5) == b"ready"
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    assert select.select([reading], [], [], 30)[0], "a worker is still there after 30 s"
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_bad_row_in_a_worker_is_a_value_error(chatml: Any) -> None:
    rows = [{"text": f"{i}"} for i in range(9)] + [{"text": ""}]
    dataset = load_dataset(rows, chatml, streaming=True, on_bad_row="error")
    with pytest.raises(ValueError, match="rows:9: column 'text' is empty"):
        list(islice(batches(dataset, batch_size=5, num_workers=1, shuffle=False), 2))


def test_workers_report_what_they_counted(chatml: Any) -> None:
    rows = [{"text": f"{i}"} for i in range(9)] + [{"text": ""}]
    for options in ({}, {"packing": True, "max_seq_len": 16}):
        dataset = load_dataset(rows, chatml, streaming=True, **options)
        list(islice(batches(dataset, batch_size=5, num_workers=2), 6))
        assert dataset.report["rows"] == 9
        assert dataset.report["dropped"] == {"empty": 1}
        assert dataset.report["problems"] == ["rows:9: column 'text' is empty"]


def test_places_of_a_step_are_those_of_its_rows(chatml: Any, rows_file: Path) -> None:
    dataset = load_dataset(rows_file, chatml)
    steps = Steps(dataset, batch_size=2, seed=0, rank=0, world_size=1, shuffle=True, micro_batch_size=None, pad_id=0)
    assert steps.places(3) == ", ".join(dataset.where(i) for i in steps.indices(3))
