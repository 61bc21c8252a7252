"""Processes that prepare batches ahead of the training loop. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tt_data.encode_processes import forking, use_one_thread
from tt_data.loader import Steps

# the batch, what was counted on the way, or what went wrong: the kind of error and its text
Prepared = tuple[Any, Any, tuple[type[Exception], str] | None]


class _StepStream(IterableDataset[Prepared]):
    """Worker ``w`` of ``n`` prepares the steps ``start + w``, ``start + w + n``, ...; together they come in order."""

    def __init__(self, steps: Steps, start_step: int) -> None:
        self.steps, self.start_step = steps, start_step

    def __iter__(self) -> Iterator[Prepared]:
        info = get_worker_info()
        assert info is not None
        for step in count(self.start_step + info.id, info.num_workers):
            try:
                batch = self.steps(step)
            except Exception as error:
                text = " ".join(str(error).split())
                is_ours = isinstance(error, ValueError)
                yield None, None, (ValueError, text) if is_ours else (RuntimeError, f"{type(error).__name__}: {text}")
                return
            take = getattr(self.steps.dataset, "take_news", None)
            yield batch, take(info.id) if take else None, None


def prepared(steps: Steps, *, start_step: int, num_workers: int, timeout_s: float) -> Iterator[Any]:
    """The batches of ``steps`` from ``start_step`` on. Raises RuntimeError naming the rows that a worker died on."""
    loader = DataLoader(
        _StepStream(steps, start_step), batch_size=None, num_workers=num_workers, timeout=timeout_s,
        collate_fn=_as_it_is, worker_init_fn=_one_thread, prefetch_factor=2,
    )  # fmt: skip
    with forking():
        ready = iter(loader)
    for step in count(start_step):
        try:
            batch, news, problem = next(ready)
        except (RuntimeError, OSError, EOFError) as error:  # the latter where it dies while a batch changes hands
            raise RuntimeError(_describe(steps, step, error, timeout_s)) from None
        if problem is not None:
            kind, text = problem
            raise kind(f"step {step}, rows {steps.places(step)}: {text}")
        if news is not None:
            steps.dataset.add_news(news)
        yield batch


def _describe(steps: Steps, step: int, error: Exception, timeout_s: float) -> str:
    what = "did not answer within" if "timed out" in str(error) else "died"
    seconds = f" {timeout_s:g} s" if "timed out" in str(error) else ""
    return (
        f"step {step}: a data worker {what}{seconds} while it prepared the rows {steps.places(step)} or the next ones; "
        "look for a full /dev/shm and for the kernel's out-of-memory killer, or set num_workers: 0 "
        f"({' '.join(str(error).split())[:200]})"
    )


def _as_it_is(item: Any) -> Any:
    return item


def _one_thread(worker: int) -> None:
    use_one_thread()
