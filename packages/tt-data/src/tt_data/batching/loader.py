"""Endless batches, in an order that is a pure function of (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, cast, overload, runtime_checkable

from tt_data.batching.collate import collate, without_loss
from tt_data.processes import map_in_processes
from tt_data.stream.stream import Stream
from tt_data.token_rows.order import rows_at, steps_per_epoch
from tt_data.wording import said

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
_LONGEST = 1500  # characters of an error


class Rows(Protocol):
    """The least that ``batches`` takes: a list of rows is enough."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...


@runtime_checkable
class RowsByEpoch(Rows, Protocol):
    """Rows with their places, in a mix different ones in every epoch: each ``Dataset`` is this."""

    def at(self, i: int, epoch: int) -> Mapping[str, Any]: ...
    def where(self, i: int, epoch: int = 0) -> str: ...


@runtime_checkable
class _Placed(Protocol):
    def where(self, i: int) -> str: ...


@runtime_checkable
class _Padded(Protocol):
    pad_id: int


@dataclass(frozen=True)
class _SameRows:
    """Rows that are not from this package, the same in every epoch."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self.rows[i]

    def at(self, i: int, epoch: int) -> Mapping[str, Any]:
        return self.rows[i]

    def where(self, i: int, epoch: int = 0) -> str:
        return self.rows.where(i) if isinstance(self.rows, _Placed) else f"row {i}"


@overload
def batches(
    dataset: Rows | Stream, *, batch_size: int, seed: int = ..., rank: int = ..., world_size: int = ...,
    num_workers: int = ..., start_step: int = ..., shuffle: bool = ..., micro_batch_size: None = None,
    pad_id: int | None = ..., timeout_s: float = ...,
) -> Iterator[Batch]: ...  # fmt: skip


@overload
def batches(
    dataset: Rows | Stream, *, batch_size: int, seed: int = ..., rank: int = ..., world_size: int = ...,
    num_workers: int = ..., start_step: int = ..., shuffle: bool = ..., micro_batch_size: int,
    pad_id: int | None = ..., timeout_s: float = ...,
) -> Iterator[list[Batch]]: ...  # fmt: skip


def batches(
    dataset: Rows | Stream, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0,
    start_step: int = 0, shuffle: bool = True, micro_batch_size: int | None = None, pad_id: int | None = None,
    timeout_s: float = 300.0,
) -> Iterator[Batch] | Iterator[list[Batch]]:  # fmt: skip
    """Endlessly, from ``start_step``: this rank's rows of each step as one batch, or as a list of micro-batches.

    ``batch_size`` counts the rows of one step over all ranks. Micro-batches hold at most ``micro_batch_size`` rows of
    similar length; every rank gets the same number of them, and one that a rank has no rows for has no label but -100.
    ``num_workers`` processes prepare the next steps; one that does not answer for ``timeout_s`` is an error.
    Raises ValueError for a wrong argument or a bad row, RuntimeError that names the rows that a worker died on.
    """
    least = {"batch_size": 1, "num_workers": 0, "start_step": 0, "micro_batch_size": 1, "world_size": 1}
    given = {"batch_size": batch_size, "num_workers": num_workers, "start_step": start_step, "world_size": world_size}
    for name, value in {**given, "micro_batch_size": 1 if micro_batch_size is None else micro_batch_size}.items():
        if value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if not isinstance(dataset, Stream) and len(dataset) == 0:
        raise ValueError("batches: the data set has 0 rows")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    if pad_id is None:
        pad_id = dataset.pad_id if isinstance(dataset, _Padded) else 0
    steps = Steps(
        dataset if isinstance(dataset, (Stream, RowsByEpoch)) else _SameRows(dataset), batch_size=batch_size, seed=seed,
        rank=rank, world_size=world_size, shuffle=shuffle, micro_batch_size=micro_batch_size, pad_id=pad_id,
    )  # fmt: skip
    made = _prepared(steps, start_step, num_workers, timeout_s) if num_workers else map(steps, count(start_step))
    return cast("Iterator[Batch]", made)


@dataclass(frozen=True)
class Steps:
    """``steps(k)``: the batch or the micro-batches of step ``k`` for one rank."""

    dataset: RowsByEpoch | Stream
    batch_size: int
    seed: int
    rank: int
    world_size: int
    shuffle: bool
    micro_batch_size: int | None
    pad_id: int

    def __call__(self, step: int) -> Batch | list[Batch]:
        rows, most = self.rows(step)
        if self.micro_batch_size is None:
            return collate(rows, pad_id=self.pad_id) if rows else self._without_loss()
        rows.sort(key=_length)
        groups = -(-most // self.micro_batch_size)
        parts = [rows[i * len(rows) // groups : (i + 1) * len(rows) // groups] for i in range(groups)]
        return [collate(part, pad_id=self.pad_id) if part else self._without_loss() for part in parts]

    def rows(self, step: int) -> tuple[list[Mapping[str, Any]], int]:
        """This rank's rows of a step, and how many rows a rank has at most in it."""
        if isinstance(self.dataset, Stream):
            rows, most = self.dataset.rows_of_step(
                step, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size, seed=self.seed,
                shuffle=self.shuffle,
            )  # fmt: skip
            return [*rows], most
        epoch, within = divmod(step, steps_per_epoch(len(self.dataset), self.batch_size))
        left = min(self.batch_size, len(self.dataset) - within * self.batch_size)
        return [self.dataset.at(i, epoch) for i in self.indices(step)], -(-left // self.world_size)

    def indices(self, step: int) -> list[int]:
        """This rank's rows of a step, of a data set that has a length."""
        assert not isinstance(self.dataset, Stream)
        return rows_at(
            step, num_rows=len(self.dataset), batch_size=self.batch_size, rank=self.rank, world_size=self.world_size,
            seed=self.seed, shuffle=self.shuffle,
        )  # fmt: skip

    def places(self, step: int) -> str:
        """Where the rows of a step were read, to name them in an error."""
        if isinstance(self.dataset, Stream):
            names = self.dataset.names
            return f"of batch {step} of the stream of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        epoch = step // steps_per_epoch(len(self.dataset), self.batch_size)
        named = [self.dataset.where(i, epoch) for i in self.indices(step)[:3]]
        return ", ".join(named) + (", ..." if self.batch_size > 3 * self.world_size else "")

    def _without_loss(self) -> Batch:
        """A batch for a rank that has no rows in a step: it must take part, and adds nothing."""
        like: Mapping[str, Any] = self.dataset.blank() if isinstance(self.dataset, Stream) else self.dataset[0]
        return without_loss(like, pad_id=self.pad_id)


def _length(row: Mapping[str, Any]) -> int:
    return max(len(row[key]) for key in row if key.endswith("input_ids"))


# ---- batches that processes prepare ------------------------------------------------------------------------------


def _prepared(steps: Steps, start_step: int, num_workers: int, timeout_s: float) -> Iterator[Batch | list[Batch]]:
    """The batches of ``steps`` from ``start_step`` on; each is prepared while the ones before it are used."""
    import torch  # noqa: F401  before the fork, so that each process knows that it may use one thread only

    stream = steps.dataset if isinstance(steps.dataset, Stream) else None

    def prepare(step: int) -> tuple[Any, Any]:
        try:
            batch = _as_bytes(steps(step))
        except Exception as error:
            rows, text = f"step {step}, rows {steps.places(step)}", said(error, _LONGEST)
            if isinstance(error, ValueError):
                raise ValueError(f"{rows}: {text}") from None
            raise RuntimeError(f"{rows}: {type(error).__name__}: {text}") from None
        return batch, None if stream is None else stream.take_news((step - start_step) % num_workers)

    def describe(step: int, what: str) -> str:
        longer = "raise timeout_s (data.worker_timeout_s of a run) if rows take long"
        cure = "look for the kernel's out-of-memory killer" if what == "died" else longer
        return (
            f"step {step}: a data worker {what} while it prepared the rows {steps.places(step)} or the next ones; "
            f"{cure}, or set num_workers: 0"
        )

    answers = map_in_processes(
        prepare, count(start_step), num_workers=num_workers, timeout_s=timeout_s, describe=describe
    )
    with closing(answers):
        for batch, news in answers:
            if stream is not None and news is not None:
                stream.add_news(news)
            yield _as_tensors(batch)


def _as_bytes(batch: Any) -> Any:
    """The batch with its tensors as (dtype, shape, bytes): torch would send them through shared memory."""
    import ctypes

    import torch

    if isinstance(batch, torch.Tensor):
        whole = batch.contiguous()
        content = bytearray(ctypes.string_at(whole.data_ptr(), whole.nbytes)) if whole.nbytes else b""
        return batch.dtype, tuple(batch.shape), content
    if isinstance(batch, dict):
        return {key: _as_bytes(value) for key, value in batch.items()}
    return [_as_bytes(value) for value in batch]


def _as_tensors(batch: Any) -> Any:
    import torch

    if isinstance(batch, tuple):
        dtype, shape, content = batch
        return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
    if isinstance(batch, dict):
        return {key: _as_tensors(value) for key, value in batch.items()}
    return [_as_tensors(value) for value in batch]
