"""Processes that prepare batches ahead of the training loop. Imports torch.

Not torch's DataLoader: there the death of a worker is raised from a signal handler, wherever the training loop happens
to be (in the middle of a save, say), and tensors go through /dev/shm, which is 64 MB in a container. Here a batch comes
through a pipe of the worker's own, and a worker that is gone is the end of its pipe.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from tt_data.loader import Steps
from tt_data.processes import forking, use_one_thread
from tt_data.wording import said

# the batch, what was counted on the way, or what went wrong: the kind of error and its text
Prepared = tuple[Any, Any, tuple[type[Exception], str] | None]


def prepared(steps: Steps, *, start_step: int, num_workers: int, timeout_s: float) -> Iterator[Any]:
    """The batches of ``steps`` from ``start_step`` on. Raises RuntimeError naming the rows that a worker died on.

    Worker ``w`` of ``n`` makes the steps ``start_step + w``, ``start_step + w + n``, ...: each is one or more ahead.
    """
    workers: list[tuple[Any, Connection]] = []
    owner = os.getpid()
    try:
        with forking():
            for worker in range(num_workers):
                workers.append(_started(steps, start_step + worker, num_workers, worker, workers))
        for step in count(start_step):
            pipe = workers[(step - start_step) % num_workers][1]
            if not pipe.poll(timeout_s):
                raise RuntimeError(_describe(steps, step, f"did not answer within {timeout_s:g} s"))
            try:
                batch, news, problem = pipe.recv()
            except (EOFError, OSError):
                raise RuntimeError(_describe(steps, step, "died")) from None
            if problem is not None:
                kind, text = problem
                raise kind(f"step {step}, rows {steps.places(step)}: {text}")
            if news is not None:
                steps.dataset.add_news(news)
            yield _as_tensors(batch)
    finally:
        for process, pipe in workers if os.getpid() == owner else ():  # a fork has a copy of this generator
            process.kill()
            process.join()
            pipe.close()


def _started(steps: Steps, first: int, stride: int, worker: int, others: list[tuple[Any, Connection]]) -> Any:
    """A new process and the end of its pipe. It closes the ends of the others, so that they notice the parent's end."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    unneeded = [here, *(pipe for _, pipe in others)]
    process = fork.Process(target=_work, args=(steps, first, stride, worker, there, unneeded), daemon=True)
    try:
        process.start()
    except BaseException:
        here.close()
        raise
    finally:
        there.close()  # the worker's copy is the only one: when the worker is gone, the pipe ends
    return process, here


def _work(steps: Steps, first: int, stride: int, worker: int, pipe: Connection, unneeded: list[Connection]) -> None:
    """What a worker does until its parent closes the pipe: the batches of its steps, or one error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent may want to go on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in unneeded:
        other.close()
    use_one_thread()
    torch.set_num_threads(1)
    take = getattr(steps.dataset, "take_news", None)
    try:
        for step in count(first, stride):
            message = _prepared(steps, step, worker, take)
            pipe.send(message)
            if message[2] is not None:
                break
    except BrokenPipeError:
        pass
    finally:
        os._exit(0)  # nothing of the parent's is cleaned up here: its files, its exit handlers, its threads' locks


def _prepared(steps: Steps, step: int, worker: int, take: Any) -> Prepared:
    try:
        batch = _as_bytes(steps(step))
        return batch, take(worker) if take else None, None
    except Exception as error:
        text = said(error, 1500)
        is_ours = isinstance(error, ValueError)
        return None, None, (ValueError, text) if is_ours else (RuntimeError, f"{type(error).__name__}: {text}")


def _as_bytes(batch: Any) -> Any:
    """The batch with its tensors as (dtype, shape, bytes): torch would send them through shared memory."""
    if isinstance(batch, torch.Tensor):
        whole = batch.contiguous()
        content = bytearray(ctypes.string_at(whole.data_ptr(), whole.nbytes)) if whole.nbytes else b""
        return batch.dtype, tuple(batch.shape), content
    if isinstance(batch, dict):
        return {key: _as_bytes(value) for key, value in batch.items()}
    return [_as_bytes(value) for value in batch]


def _as_tensors(batch: Any) -> Any:
    if isinstance(batch, tuple):
        dtype, shape, content = batch
        return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
    if isinstance(batch, dict):
        return {key: _as_tensors(value) for key, value in batch.items()}
    return [_as_tensors(value) for value in batch]


def _describe(steps: Steps, step: int, what: str) -> str:
    longer = "raise timeout_s (data.worker_timeout_s of a run) if rows take long"
    cure = "look for the kernel's out-of-memory killer" if what == "died" else longer
    return (
        f"step {step}: a data worker {what} while it prepared the rows {steps.places(step)} or the next ones; "
        f"{cure}, or set num_workers: 0"
    )
