"""The settings that decide the token rows, beside the source and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from tt_data.messages import TrainOn
from tt_data.template.prompts import our_name
from tt_data.text.choose import SpecialTokensInText

OnBadRow = Literal["drop", "error"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of ``load_dataset`` that its fingerprint covers. Raises ValueError for a wrong value."""

    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: TrainOn = "assistant"
    max_seq_len: int | None = None
    template: str | None = None
    schema: str | None = None
    on_bad_row: OnBadRow = "drop"
    drop_duplicates: bool = True
    special_tokens: SpecialTokensInText = "text"
    max_dropped_share: float | None = None  # of the rows: more bad ones than that are an error; duplicates do not count

    def __post_init__(self) -> None:
        if self.train_on not in get_args(TrainOn):
            raise ValueError(f"train_on must be one of {', '.join(get_args(TrainOn))}, got {self.train_on!r}")
        if self.template is not None:
            object.__setattr__(self, "template", our_name(self.template))
        if self.special_tokens not in ("text", "tokens"):
            raise ValueError(f"special_tokens must be text or tokens, got {self.special_tokens!r}")
        if self.on_bad_row not in ("drop", "error"):
            raise ValueError(f"on_bad_row must be drop or error, got {self.on_bad_row!r}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")
        if self.max_dropped_share is not None and not 0 <= self.max_dropped_share <= 1:
            raise ValueError(f"max_dropped_share must be between 0 and 1, got {self.max_dropped_share}")
