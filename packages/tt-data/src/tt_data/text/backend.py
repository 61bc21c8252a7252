"""What a tokenizer file must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tt_data.template.spans import Encoded, Rendered


class Backend(Protocol):
    """``added``: tokens that are found whole in text, with their ids; ``control``: those of them that a text which
    someone typed never becomes."""

    added: dict[str, int]
    control: dict[str, int]
    vocab_size: int

    def with_control(self, control: dict[str, int]) -> Backend: ...
    def token_id(self, token: str) -> int | None: ...
    def token(self, index: int) -> str | None: ...
    def to_str(self) -> str: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str: ...
    def encode_batch(self, rows: Sequence[Rendered]) -> list[Encoded]: ...
