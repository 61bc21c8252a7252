"""Encoding whole sources: in this process, or in several that each take batches of rows."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tt_data.report import Tally
from tt_data.row_encoder import RowEncoder, TokenRow
from tt_data.rows.readers import Read
from tt_data.rows.settings import Settings
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import said

Batch = list[tuple[int, Mapping[str, Any]]]
Encoded = tuple[list[TokenRow], Tally]


def encode_here(
    name: str, batches: Iterator[Batch], read: Read, tokenizer: Tokenizer, settings: Settings
) -> Iterator[Encoded]:
    """The rows of each batch that can be learned from, and what was counted."""
    for batch in batches:
        tally = Tally()
        yield RowEncoder(tokenizer, settings, tally).encode(name, batch, read), tally


def encode_in_processes(
    name: str, batches: Iterator[Batch], read: Read, tokenizer: Tokenizer, settings: Settings, *, num_workers: int,
    timeout_s: float,
) -> Iterator[Encoded]:  # fmt: skip
    """The same from ``num_workers`` processes, in the same order. Raises RuntimeError that names the rows at fault."""
    with forking():
        pool = ProcessPoolExecutor(
            num_workers, multiprocessing.get_context("fork"), _start_worker, (name, read, tokenizer, settings)
        )
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, batch)))
                if len(waiting) > 2 * num_workers:
                    yield _answer(name, *waiting.popleft(), timeout_s)
            while waiting:
                yield _answer(name, *waiting.popleft(), timeout_s)
        except BaseException:
            for process in list((pool._processes or {}).values()):  # one may hang: it would be waited for
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _answer(name: str, batch: Batch, future: Future[Encoded], timeout_s: float) -> Encoded:
    rows = f"{name}:{batch[0][0]} to {name}:{batch[-1][0]}"
    try:
        return future.result(timeout=timeout_s)
    except TimeoutError:
        raise RuntimeError(f"rows {rows}: a process that encodes them did not answer within {timeout_s:g} s") from None
    except BrokenProcessPool:
        raise RuntimeError(
            f"rows {rows} or the next ones: a process that encodes them died; look for the kernel's out-of-memory "
            "killer, or set num_workers: 0"
        ) from None
    except ValueError:
        raise
    except Exception as error:
        raise RuntimeError(f"rows {rows}: {type(error).__name__}: {said(error, 500)}") from None


_work: tuple[str, Read, Tokenizer, Settings] | None = None  # in a worker: what all of its batches share


def _start_worker(name: str, read: Read, tokenizer: Tokenizer, settings: Settings) -> None:
    global _work
    use_one_thread()
    _work = name, read, tokenizer, settings


def _encode(batch: Batch) -> Encoded:
    assert _work is not None
    name, read, tokenizer, settings = _work
    tally = Tally()
    return RowEncoder(tokenizer, settings, tally).encode(name, batch, read), tally


def use_one_thread() -> None:
    """In a worker: threads of the parent's tokenizers did not survive the fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def forking() -> Iterator[None]:
    """While workers start: keeps the tokenizers library from warning that it has been forked.

    Raises ValueError where the system cannot fork (Windows).
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
