"""One piece of work at a time in a thread, whose failure is not lost."""

import threading
from collections.abc import Callable
from pathlib import Path


class Background:
    """Runs what ``start`` is given; ``check`` and ``wait`` return its result once, or raise what it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: Path | BaseException | None = None

    def start(self, work: Callable[[], Path]) -> None:
        assert self._thread is None, "wait first"

        def run() -> None:
            try:
                self._outcome = work()
            except BaseException as error:
                self._outcome = error

        self._thread = threading.Thread(target=run, name="tt-ckpt save")
        self._thread.start()

    def check(self) -> Path | None:
        """The result when the work has ended since the last look, None while it goes on or when there is none."""
        return self.wait() if self._thread is not None and not self._thread.is_alive() else None

    def wait(self, timeout: float | None = None) -> Path | None:
        """The same after at most ``timeout`` seconds."""
        if self._thread is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        self._thread, outcome, self._outcome = None, self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
