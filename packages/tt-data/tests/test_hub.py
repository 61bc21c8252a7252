"""Data sets of the hub, with the datasets library's own objects in place of the network."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from tt_data import batches, load_dataset

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"row {i}"} for i in range(23)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answers ``datasets.load_dataset``; the list holds how it was asked."""
    asked: list[dict[str, Any]] = []

    def load(name: str, *, split: str | None = None, streaming: bool = False) -> Any:
        asked.append({"name": name, "split": split, "streaming": streaming})
        splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
        if name == "someone/parts":
            splits = {"first": splits["train"], "second": splits["test"]}
        found = {key: part.to_iterable_dataset() if streaming else part for key, part in splits.items()}
        if split is not None and split not in found:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(found)}.')
        if split is not None:
            return found[split]
        return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(found)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_an_id_is_asked_of_the_hub(chatml: Any, hub: list[dict[str, Any]]) -> None:
    dataset = load_dataset("someone/rows", chatml)
    assert hub == [{"name": "someone/rows", "split": None, "streaming": False}]
    assert len(dataset) == 23
    assert dataset.where(3) == "someone/rows:3"
    assert len(load_dataset("someone/rows", chatml, split="test")) == 2


def test_splits_are_named_in_errors(chatml: Any, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match='someone/rows: Unknown split "trian". Should be one of'):
        load_dataset("someone/rows", chatml, split="trian")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"someone/parts: name a split, expected one of \['first', 'second'\]"):
            load_dataset("someone/parts", chatml, streaming=streaming)


def test_registered_names_lead_to_the_hub(chatml: Any, hub: list[dict[str, Any]]) -> None:
    load_dataset("alpaca_cleaned", chatml, schema="text")
    assert hub == [{"name": "yahma/alpaca-cleaned", "split": "train", "streaming": False}]


def test_a_hub_stream_is_resumed_in_the_middle(chatml: Any, hub: list[dict[str, Any]]) -> None:
    def texts(**options: Any) -> list[list[str]]:
        stream = load_dataset("someone/rows", chatml, streaming=True, buffer=5)
        found = islice(batches(stream, batch_size=4, **options), 14 - options.get("start_step", 0))
        return [[chatml.decode(ids) for ids in batch["input_ids"].tolist()] for batch in found]

    whole = texts()
    assert hub[0]["streaming"]
    assert sorted(text for step in whole[:6] for text in step) == sorted(row["text"] for row in ROWS)
    assert sorted(text for step in whole[6:12] for text in step) == sorted(row["text"] for row in ROWS)
    for start in (1, 5, 6, 11):
        assert texts(start_step=start) == whole[start:]
