"""What decides the token rows, next to the source and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from tt_data.encode import TrainOn, check_train_on

OnBadRow = Literal["drop", "error"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of ``load_dataset`` that its fingerprint holds. Raises ValueError for a value that is none."""

    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: TrainOn = "assistant"
    max_seq_len: int | None = None
    template: str | None = None
    schema: str | None = None
    on_bad_row: OnBadRow = "drop"
    drop_duplicates: bool = True

    def __post_init__(self) -> None:
        check_train_on(self.train_on)
        if self.on_bad_row not in ("drop", "error"):
            raise ValueError(f"on_bad_row must be drop or error, got {self.on_bad_row!r}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")

    def key(self) -> str:
        """The settings as text, for a fingerprint."""
        return json.dumps(asdict(self), sort_keys=True)
