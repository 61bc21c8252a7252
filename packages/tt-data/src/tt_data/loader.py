"""Endless batches, in an order that is a pure function of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from tt_data.collate import IGNORE_INDEX, collate
from tt_data.order import rows_at

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]


class Rows(Protocol):
    """What ``batches`` needs of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> dict[str, Any]: ...


def batches(
    dataset: Rows, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0,
    start_step: int = 0, shuffle: bool = True, micro_batch_size: int | None = None, pad_id: int | None = None,
) -> Iterator[Any]:  # fmt: skip
    """Endlessly, from ``start_step``: this rank's rows of each step as one batch, or as a list of micro-batches.

    ``batch_size`` counts the rows of one step over all ranks. Micro-batches hold at most ``micro_batch_size`` rows of
    similar length; every rank gets the same number of them, those that a rank has no rows for have labels of -100 only.
    """
    if len(dataset) == 0:
        raise ValueError("batches: the data set has 0 rows")
    if micro_batch_size is not None and micro_batch_size <= 0:
        raise ValueError(f"micro_batch_size must be positive, got {micro_batch_size}")
    pad = getattr(dataset, "pad_id", 0) if pad_id is None else pad_id
    step = start_step
    while True:
        rows = rows_at(
            step, num_rows=len(dataset), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed,
            shuffle=shuffle,
        )  # fmt: skip
        most = rows_at(step, num_rows=len(dataset), batch_size=batch_size, world_size=world_size, shuffle=False)
        yield _step(dataset, rows, len(most), micro_batch_size, pad)
        step += 1


def _step(dataset: Rows, indices: list[int], most: int, micro_batch_size: int | None, pad_id: int) -> Any:
    """One step's batch or micro-batches; ``most`` is the largest number of rows that a rank has in it."""
    rows = [dataset[i] for i in indices]
    if micro_batch_size is None:
        return collate(rows, pad_id=pad_id) if rows else _without_loss(dataset, pad_id)
    rows.sort(key=_length)
    count = -(-most // micro_batch_size)
    groups = [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]
    return [collate(group, pad_id=pad_id) if group else _without_loss(dataset, pad_id) for group in groups]


def _length(row: dict[str, Any]) -> int:
    return max(len(row[key]) for key in row if key.endswith("input_ids"))


def _without_loss(dataset: Rows, pad_id: int) -> Batch:
    """A batch for a rank that has no rows left in a short step: it must take part, and adds nothing."""
    row = dataset[0]
    batch = collate(
        [{key: value[:2] if isinstance(value, list) else value for key, value in row.items()}], pad_id=pad_id
    )
    for key in batch:
        if key.endswith("labels"):
            batch[key].fill_(IGNORE_INDEX)
    return batch
