"""Signals that ask a run to stop: the first is obeyed between steps, the second ends the process at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tt_train.devices.distributed import world
from tt_train.errors import Interrupted

_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Stopped(BaseException):
    """Raised where the run may stop; no ``except Exception`` on the way up takes it for an error."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


class StopRequest:
    """``with StopRequest() as stop``: a signal is noted, and answered by ``check`` or inside ``at_once``.

    The answer is Stopped; one that nobody has turned into Interrupted by the end of the block becomes one there, with
    ``checkpoint`` and ``step``, which the run began with. Several ranks answer together, so that none waits for one
    that has left: a signal to one of them stops all, and ``at_once`` answers at its end.
    """

    def __init__(self, *, checkpoint: str | None = None, step: int = 0) -> None:
        self.signal: int | None = None
        self._begun_with = (checkpoint, step)
        self._before: dict[int, Any] = {}
        self._at_once = False
        self._owner = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            raise Interrupted(error.signal_number, *self._begun_with) from None

    def check(self) -> None:
        """Raise Stopped if a signal has come, to any rank: every rank must call this."""
        if world().any(self.signal is not None):
            raise Stopped(self.signal or signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal is answered the moment it comes: for work that can be abandoned anywhere."""
        if world().size > 1:
            yield
            self.check()
            return
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or os.getpid() != self._owner:  # a second one; or a forked process is meant to end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number
        if self._at_once:
            self._at_once = False  # once: what cleans up is not interrupted again
            raise Stopped(number)
