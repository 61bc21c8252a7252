"""The base of all streams: rows that ``batches`` asks for by step, without a length or an index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tt_data.examples import Kind
from tt_data.report import Report
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import Piece, Row, TokenDataset


class Stream(ABC):
    """Rows, packed or not, that are read while training: what ``load_dataset(..., streaming=True)`` returns.

    ``names``: the files, or the data set of the hub, that are read. ``report`` counts what this process has read of the
    first epoch.
    """

    tokenizer: Tokenizer
    pad_id: int
    schema: str
    fingerprint: str
    names: list[str]
    is_packed = False  # whether a row is a pack of several documents

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What a row holds: ``single``, ``pair`` or ``judged``."""

    @property
    @abstractmethod
    def report(self) -> Report: ...

    @abstractmethod
    def locate(self, step: int, batch_size: int, *, seed: int) -> tuple[int, range]:
        """The epoch of a step, and its places in it. No more is read than it takes to know them."""

    @abstractmethod
    def rows_of(self, epoch: int, places: range, *, seed: int, shuffle: bool) -> Sequence[Row]:
        """The rows at some places of an epoch; none for a place whose row is bad."""

    def rows_of_step(
        self, step: int, *, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool
    ) -> tuple[Sequence[Row], int]:
        """This rank's rows of a step, and how many rows a rank has at most in it."""
        epoch, places = self.locate(step, batch_size, seed=seed)
        return self.rows_of(epoch, places[rank::world_size], seed=seed, shuffle=shuffle), len(places[::world_size])

    @abstractmethod
    def blank(self) -> Row:
        """Two padding tokens in the shape of a row."""

    @abstractmethod
    def take_news(self, worker: int) -> Any:
        """What a worker has counted since it was last asked, for ``add_news`` in the process that holds the report."""

    @abstractmethod
    def add_news(self, news: Any) -> None:
        """Count what a worker has counted."""

    @abstractmethod
    def head(self, rows: int = 16) -> TokenDataset:
        """The first rows that can be used, not packed, as a separate data set, to look at."""

    @abstractmethod
    def head_report(self) -> Report:
        """What becomes of the first rows."""

    def rendered(self, i: int) -> list[Piece]:
        """Row ``i`` of the stream, not packed, as text pieces and whether each is trained."""
        return self.head(max(16, 2 * i)).rendered(i)
