"""Data sets of the hub, with the datasets library's own objects in place of the network."""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import islice
from typing import Any

import pytest

import tt_data
from tt_data import batches, load_dataset

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"row {i}"} for i in range(23)]


class Builder:
    """What ``datasets.load_dataset_builder`` returns, of the files of ``name``."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked, self.config = asked, None

    def download_and_prepare(self) -> None:
        self.asked["prepared"] = True

    def as_dataset(self, split: str | None, streaming: bool = False) -> Any:
        self.asked.update(split=split, streaming=streaming)
        splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
        if self.asked["name"] == "someone/parts":
            splits = {"first": splits["train"], "second": splits["test"]}
        found = {key: part.to_iterable_dataset() if streaming else part for key, part in splits.items()}
        if split is not None and split not in found:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(found)}.')
        if split is not None:
            return found[split]
        return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(found)

    def as_streaming_dataset(self, split: str | None) -> Any:
        assert "prepared" not in self.asked
        return self.as_dataset(split, streaming=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answers ``datasets.load_dataset_builder``; the list holds how it was asked."""
    asked: list[dict[str, Any]] = []

    def load(name: str, **part: Any) -> Builder:
        asked.append({"name": name, **part})
        return Builder(asked[-1])

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return asked


def test_an_id_is_asked_of_the_hub(chatml: Any, hub: list[dict[str, Any]]) -> None:
    dataset = load_dataset("someone/rows", chatml)
    assert hub == [{"name": "someone/rows", "prepared": True, "split": None, "streaming": False}]
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
    assert hub == [{"name": "yahma/alpaca-cleaned", "prepared": True, "split": "train", "streaming": False}]


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


BUILDERS = [
    tt_data.alpaca_dataset, tt_data.alpaca_cleaned_dataset, tt_data.grammar_dataset, tt_data.samsum_dataset,
    tt_data.slimorca_dataset, tt_data.stack_exchange_paired_dataset,
]  # fmt: skip
PART = {"data_dir": "some", "data_files": "x.jsonl", "revision": "abc"}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_builder_hands_the_part_on_to_the_hub(
    spm: Any, hub: list[dict[str, Any]], build: Any, streaming: bool
) -> None:
    for more in ({}, {"source": "someone/rows"}):
        hub.clear()
        with contextlib.suppress(ValueError):  # the rows are of another kind
            build(spm, split="test", streaming=streaming, **PART, **more)
        assert {key: hub[0][key] for key in ("split", *PART)} == {"split": "test", **PART}
        assert hub[0]["name"] == more.get("source", hub[0]["name"])


@pytest.mark.parametrize("load", [
    tt_data.stack_exchange_paired_dataset, partial(load_dataset, "stack_exchange_paired"),
])  # fmt: skip
def test_stack_exchange_is_the_folder_with_preferences(spm: Any, hub: list[dict[str, Any]], load: Any) -> None:
    name = {"name": "lvwerra/stack-exchange-paired", "prepared": True, "split": "train", "streaming": False}
    for options, data_dir in (({}, "data/rl"), ({"data_dir": "data/reward"}, "data/reward")):
        hub.clear()
        with contextlib.suppress(ValueError):
            load(tokenizer=spm, **options)
        assert hub == [{**name, "data_dir": data_dir}]


@pytest.mark.parametrize("build", [*BUILDERS, tt_data.chat_dataset, tt_data.instruct_dataset])
def test_a_wrong_keyword_is_named_with_the_nearest(spm: Any, build: Any) -> None:
    needed = {"source": []} if build is tt_data.chat_dataset else {"source": [], "template": "alpaca"}
    needed = needed if build in (tt_data.chat_dataset, tt_data.instruct_dataset) else {"source": []}
    for wrong, near in (("max_seq_length", "max_seq_len"), ("spilt", "split"), ("colum_map", "column_map")):
        with pytest.raises(TypeError, match=rf"_dataset: unknown argument '{wrong}'; did you mean '{near}'\?"):
            build(spm, **needed, **{wrong: 5})


FOREIGN = [
    ("json", "/etc/passwd", "names a file that is not its own"), ("json", "https://x.org/a.jsonl", "not its own"),
    ("json", "hf://datasets/org/other@abc/a.jsonl", "not its own"),
    ("csv", "hf://datasets/org/rows@abc/../a", "not its own"),
    ("json", "zip://a.json::hf://datasets/org/rows@abc/a.zip", "not its own"),
    ("json", "hf://datasets/org/rows@abc/a.zip", "an archive, which is not unpacked; download it"),
    ("text", "hf://datasets/org/rows@abc/A.TAR.GZ", "an archive"),
    ("webdataset", "hf://datasets/org/rows@abc/a", "read as"),
    ("pandas", "hf://datasets/org/rows@abc/a.pkl", "its files are read as 'pandas', expected one of json, csv"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "text"), FOREIGN)
def test_a_data_set_of_the_hub_is_its_own_files_of_rows(kind: str, file: str, text: str) -> None:
    """Also with a ``datasets`` that does not check this itself (before 5)."""
    from types import SimpleNamespace

    from tt_data.rows.hub import _refuse_foreign

    def builder(*files: str) -> Any:
        made = type("Builder", (), {"__module__": f"datasets.packaged_modules.{kind}.{kind}"})()
        made.config = SimpleNamespace(data_files={"train": list(files)})
        return made

    own = "hf://datasets/Org/rows@abc/data/a.jsonl"
    if kind in ("json", "csv", "text"):
        _refuse_foreign("org/rows", builder(own))
    with pytest.raises(ValueError, match=text):
        _refuse_foreign("org/rows", builder(own, file))
