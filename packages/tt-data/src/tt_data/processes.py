"""One map over processes: for rows that are encoded, and for batches that are prepared ahead of the training loop.

Not concurrent.futures, whose processes stay behind if this one is killed. Not torch's DataLoader either: it raises the
death of a worker from a signal handler, wherever the training loop happens to be (in the middle of a save, say), and
sends tensors through /dev/shm, which is 64 MB in a container. Here each process has its own pipe, and a process that
is gone is the end of its pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from tt_data.wording import said

Task = TypeVar("Task")
Answer = TypeVar("Answer")
_AHEAD = 2  # tasks of a process: the one that it works on, and the next one
_END = object()
CAN_FORK = "fork" in multiprocessing.get_all_start_methods()  # not on Windows


def map_in_processes(
    work: Callable[[Task], Answer], tasks: Iterable[Task], *, num_workers: int, timeout_s: float,
    describe: Callable[[Task, str], str],
) -> Generator[Answer, None, None]:  # fmt: skip
    """``work(task)`` for each of ``tasks``, in their order. Process ``w`` of ``n`` does the tasks ``w``, ``w + n``, ...

    Errors are raised by ``next`` and nowhere else. A ValueError of ``work`` is raised with its text, any other error as
    a RuntimeError with its text. ``describe(task, "died")`` or ``describe(task, "did not answer within 2 s")`` is the
    text of the RuntimeError for a process that is gone, or that takes longer than ``timeout_s``.
    """
    processes: list[tuple[BaseProcess, Connection]] = []
    owner = os.getpid()
    given: deque[tuple[Task, Connection]] = deque()
    left = iter(tasks)

    def give(pipe: Connection) -> None:
        task: Any = next(left, _END)
        if task is not _END:
            _send(task, pipe, describe)
            given.append((task, pipe))

    try:
        with _forking():
            for _ in range(num_workers):
                processes.append(_started(work, [pipe for _, pipe in processes]))
        for _, pipe in processes * _AHEAD:
            give(pipe)
        while given:
            task, pipe = given.popleft()
            answer = _answer(task, pipe, timeout_s, describe)
            give(pipe)
            yield answer
    finally:
        for process, pipe in processes if os.getpid() == owner else ():  # a fork has a copy of this generator
            process.kill()
            process.join()
            pipe.close()


def _send(task: Task, pipe: Connection, describe: Callable[[Task, str], str]) -> None:
    try:
        pipe.send(task)
    except OSError:  # the process is gone; asking for its answer is the place to notice
        pass
    except Exception as error:  # what cannot be pickled raises errors of all kinds
        raise RuntimeError(describe(task, f"cannot be sent them ({type(error).__name__}: {said(error)})")) from None


def _answer(task: Task, pipe: Connection, timeout_s: float, describe: Callable[[Task, str], str]) -> Any:
    if not pipe.poll(timeout_s):
        raise RuntimeError(describe(task, f"did not answer within {timeout_s:g} s"))
    try:
        answer, problem = pipe.recv()
    except (EOFError, OSError):
        raise RuntimeError(describe(task, "died")) from None
    if problem is not None:
        kind, text = problem
        raise kind(text)
    return answer


@contextmanager
def _forking() -> Iterator[None]:
    """While processes start: keeps the tokenizers library from warning that it has been forked.

    Raises ValueError if the system cannot fork (Windows).
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError("num_workers: this system cannot fork processes; set num_workers: 0")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


def _started(work: Callable[[Task], Answer], others: list[Connection]) -> tuple[BaseProcess, Connection]:
    """A new process and our end of its pipe. It closes our ends of the ``others``, so that these end with us."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_answer_all, args=(work, there, [here, *others]), daemon=True)
    try:
        process.start()
    except BaseException:
        here.close()
        raise
    finally:
        there.close()  # the copy of the process is the only one: when the process is gone, the pipe ends
    return process, here


def _answer_all(work: Callable[[Task], Answer], pipe: Connection, unneeded: list[Connection]) -> None:
    """What a process does until its parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent may want to continue
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in unneeded:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent's tokenizers did not survive the fork
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    tasks: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_receive, args=(pipe, tasks), daemon=True).start()  # else both ends may wait in ``send``
    try:
        while True:
            pipe.send(_done(work, tasks.get()))
            sys.stdout.flush()
    except OSError:
        pass
    finally:
        os._exit(0)  # nothing of the parent's is cleaned up here: its files, its exit handlers, its threads' locks


def _receive(pipe: Connection, tasks: SimpleQueue[Any]) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _done(work: Callable[[Task], Answer], task: Task) -> tuple[Answer | None, tuple[type[Exception], str] | None]:
    try:
        return work(task), None
    except Exception as error:
        return None, (ValueError if isinstance(error, ValueError) else RuntimeError, str(error))
