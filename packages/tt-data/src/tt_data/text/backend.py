"""What a kind of tokenizer file must be able to do. The classes of this folder and those of other packages do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tt_data.template.spans import Encoded, MarkedText


class Backend(Protocol):
    """What a ``Tokenizer`` needs of a vocabulary: implement it to use a tokenizer of a different kind.

    ``added``: tokens that are found whole in text, with their ids. ``control``: those of them that text typed by a
    person never becomes. ``vocab_size``: one more than the largest id.
    """

    added: dict[str, int]
    control: dict[str, int]
    vocab_size: int

    def with_control(self, control: dict[str, int]) -> Backend:
        """The same vocabulary with other control tokens, which are some of ``added``."""

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it."""

    def to_str(self) -> str:
        """Text that changes with whatever changes ids; the cache of token rows depends on it."""

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ``ids``, without added tokens if ``skip_special``."""

    def encode_batch(self, rows: Sequence[MarkedText]) -> list[Encoded]:
        """The ids of each text, with nothing before or after them, and the tokens that contain a character of each span
        in ``trained`` (``token_spans`` finds these). Control tokens come from the spans of ``controls`` alone; if that
        is None, from any text that spells one (``AddedTokens`` finds both)."""
