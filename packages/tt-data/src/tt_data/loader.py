"""Endless batches, in an order that is a pure function of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from tt_data.collate import IGNORE_INDEX, collate
from tt_data.order import rows_at, steps_per_epoch

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]


def batches(
    dataset: Any, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0,
    start_step: int = 0, shuffle: bool = True, micro_batch_size: int | None = None, pad_id: int | None = None,
    timeout_s: float = 300.0,
) -> Iterator[Any]:  # fmt: skip
    """Endlessly, from ``start_step``: this rank's rows of each step as one batch, or as a list of micro-batches.

    ``batch_size`` counts the rows of one step over all ranks. Micro-batches hold at most ``micro_batch_size`` rows of
    similar length; every rank gets the same number of them, those that a rank has no rows for have labels of -100 only.
    ``num_workers`` processes prepare the steps to come; one that does not answer for ``timeout_s`` is an error.
    """
    least = {"batch_size": 1, "num_workers": 0, "start_step": 0, "micro_batch_size": 1, "world_size": 1}
    given = {"batch_size": batch_size, "num_workers": num_workers, "start_step": start_step, "world_size": world_size}
    for name, value in {**given, "micro_batch_size": 1 if micro_batch_size is None else micro_batch_size}.items():
        if value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("batches: the data set has 0 rows")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    steps = Steps(
        dataset, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle,
        micro_batch_size=micro_batch_size, pad_id=getattr(dataset, "pad_id", 0) if pad_id is None else pad_id,
    )  # fmt: skip
    if num_workers == 0:
        return map(steps, count(start_step))
    from tt_data.workers import prepared

    return prepared(steps, start_step=start_step, num_workers=num_workers, timeout_s=timeout_s)


@dataclass
class Steps:
    """``steps(k)``: the batch or the micro-batches of step ``k`` for one rank."""

    dataset: Any
    batch_size: int
    seed: int
    rank: int
    world_size: int
    shuffle: bool
    micro_batch_size: int | None
    pad_id: int

    def __call__(self, step: int) -> Any:
        rows, most = self.rows(step)
        if self.micro_batch_size is None:
            return collate(rows, pad_id=self.pad_id) if rows else self._without_loss()
        rows.sort(key=_length)
        groups = -(-most // self.micro_batch_size)
        parts = [rows[i * len(rows) // groups : (i + 1) * len(rows) // groups] for i in range(groups)]
        return [collate(part, pad_id=self.pad_id) if part else self._without_loss() for part in parts]

    def rows(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """This rank's rows of a step, and how many rows a rank has at most in it."""
        if hasattr(self.dataset, "rows_of_step"):
            found: tuple[list[dict[str, Any]], int] = self.dataset.rows_of_step(
                step, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size, seed=self.seed,
                shuffle=self.shuffle,
            )  # fmt: skip
            return found
        epoch, within = divmod(step, steps_per_epoch(len(self.dataset), self.batch_size))
        left = min(self.batch_size, len(self.dataset) - within * self.batch_size)
        at = getattr(self.dataset, "at", None)
        rows = [self.dataset[i] if at is None else at(i, epoch) for i in self.indices(step)]
        return rows, -(-left // self.world_size)

    def indices(self, step: int) -> list[int]:
        """This rank's rows of a step, of a data set that has a length."""
        return rows_at(
            step, num_rows=len(self.dataset), batch_size=self.batch_size, rank=self.rank, world_size=self.world_size,
            seed=self.seed, shuffle=self.shuffle,
        )  # fmt: skip

    def places(self, step: int) -> str:
        """Where the rows of a step were read, to name them in an error."""
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "where"):
            names = getattr(self.dataset, "names", [])
            of = f" of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
            return f"of batch {step} of the stream{of}"
        epoch = step // steps_per_epoch(len(self.dataset), self.batch_size)
        at = (epoch,) if hasattr(self.dataset, "at") else ()  # a mix holds other rows in every epoch
        named = [self.dataset.where(i, *at) for i in self.indices(step)[:3]]
        return ", ".join(named) + (", ..." if self.batch_size > 3 * self.world_size else "")

    def _without_loss(self) -> Batch:
        """A batch for a rank that has no rows in a step: it must take part, and adds nothing."""
        like = self.dataset[0] if hasattr(self.dataset, "__getitem__") else self.dataset.blank()
        row = {key: value[:2] if isinstance(value, list) else value for key, value in like.items()}
        batch = collate([row], pad_id=self.pad_id)
        for key in batch:
            if key.endswith("labels"):
                batch[key].fill_(IGNORE_INDEX)
        return batch


def _length(row: dict[str, Any]) -> int:
    return max(len(row[key]) for key in row if key.endswith("input_ids"))
