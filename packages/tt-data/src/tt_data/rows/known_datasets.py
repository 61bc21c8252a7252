"""Data sets that are known by a name: ``load_dataset("alpaca_cleaned", tokenizer)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tt_data.rows.hub import Part


@dataclass(frozen=True)
class NamedDataset:
    """Where a data set is, how its columns are called, and the template of rows that have no schema of their own.
    ``split``, ``data_dir``, ``data_files`` and ``revision`` say which part of it, if the caller does not."""

    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    split: str | None = "train"
    data_dir: str | None = None
    data_files: Any = None
    revision: str | None = None

    @property
    def part(self) -> Part:
        return Part(split=self.split, data_dir=self.data_dir, data_files=self.data_files, revision=self.revision)


DATASETS: dict[str, NamedDataset] = {
    "alpaca": NamedDataset("tatsu-lab/alpaca"),
    "alpaca_cleaned": NamedDataset("yahma/alpaca-cleaned"),
    "grammar": NamedDataset("liweili/c4_200m", {"sentence": "input"}, "grammar"),
    "samsum": NamedDataset("Samsung/samsum", {"output": "summary"}, "summarize"),
    "slimorca": NamedDataset("Open-Orca/SlimOrca-Dedup"),
    "stack_exchange_paired": NamedDataset(
        "lvwerra/stack-exchange-paired",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        "stack_exchange_paired",
        data_dir="data/rl",  # the other folders hold rows for supervised training and for a reward model
    ),
}


def register_dataset(name: str, dataset: NamedDataset) -> None:
    """Make a data set known by ``name``."""
    DATASETS[name] = dataset
