"""What is said while rows are encoded: of a million of them that takes minutes, before step 1.

The console of a run does not exist yet. This module writes to stderr, one line that replaces itself on a terminal.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType

from tt_train.config import RunConfig
from tt_train.errors import counted
from tt_train.settings.keys.mistakes import mistakes

AFTER_S = 5.0  # of encoding: what takes less is not worth a line
_EVERY_S, _EVERY_DRAWN_S = 10.0, 1.0  # in a pipe, and on a terminal

Count = Callable[[], float | None]


class Encoding:
    """The ``progress`` of ``tt_data.load_dataset``; as a context manager it says at the end how long encoding took.

    ``hint``: gives a line to say once, or nothing. ``clock``: seconds.
    """

    def __init__(self, hint: Callable[[], str] = str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.hint, self.clock = hint, clock
        self.draws = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.began: float | None = None  # when the first rows of a source were there
        self.read = self.first = self.before = 0  # rows of this source: so far, at ``began``; and those of earlier ones
        self.total: float | None = None
        self.start: float | None = None
        self.next = 0.0
        self.said = False

    def __call__(self, read: int, count: Count) -> None:
        """``read`` rows are encoded; ``count`` counts all of them."""
        now = self.clock()
        if self.start is None:
            self.start, self.next = now, now + AFTER_S
        if self.began is None or read < self.read:  # the first source, or the next one of a mix
            self.before += self.read
            self.began, self.first, self.total = now, read, count() if self.said else None
        self.read = read
        if now < self.next or read == self.first:
            return
        if not self.said:
            self.said, self.total = True, count()
            if hint := self.hint():
                _print(hint)
        self._show(now - self.began)
        self.next = now + (_EVERY_DRAWN_S if self.draws else _EVERY_S)

    def _show(self, seconds: float) -> None:
        rate = (self.read - self.first) / max(seconds, 1e-9)
        line = f"encoding rows: {progress_words(self.read, self.total, rate)}"
        if self.draws:
            width = shutil.get_terminal_size().columns - 1
            _print(f"\r{line[:width]:<{width}}", end="")
        else:
            _print(line)

    def __enter__(self) -> "Encoding":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.said:
            return
        if self.draws:
            _print(f"\r{'':<{shutil.get_terminal_size().columns - 1}}", end="")
            _print("\r", end="")
        if error is None and self.start is not None:
            _print(f"encoded {counted(self.before + self.read, 'row')} in {seconds_words(self.clock() - self.start)}")


def progress_words(read: int, total: float | None, rate: float) -> str:
    """``38,912 of 1,000,000 (7,800 rows/s, 2 min left)``; ``total`` is an estimate if it is a float."""
    speed = f"{rate:,.0f} rows/s"
    if total is None or total < read:
        return f"{read:,} ({speed})"
    shown = f"{total:,}" if isinstance(total, int) else f"about {float(f'{total:.2g}'):,.0f}"
    return f"{read:,} of {shown} ({speed}, {seconds_words((total - read) / max(rate, 1e-9))} left)"


def seconds_words(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def streaming_hint(config: RunConfig) -> str:
    """How the same run would start at once; nothing if it cannot stream its rows."""
    share = config.data.eval
    if isinstance(share, str) and is_number(share):
        return ""
    sources = config.data.train
    if isinstance(sources, Mapping) and not all(os.path.lexists(str(source)) for source in sources):
        return ""  # of registered names, each may need a template of its own, which a stream does not have
    streamed = replace(config, data=replace(config.data, streaming=True), max_steps=config.max_steps or 1)
    if mistakes(streamed):
        return ""
    words = "data.streaming=true" if config.max_steps else "data.streaming=true and max_steps=N"
    kept = "; it would keep duplicate rows" if config.data.drop_duplicates else ""
    return f"all rows are encoded before step 1; with {words} the run starts at once{kept}"


def is_number(text: str) -> bool:
    """Whether ``text`` is a share such as ``0.05``."""
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()


def _print(text: str, *, end: str = "\n") -> None:
    if not getattr(sys.stderr, "hushed", False):  # by tt -q
        print(text, end=end, file=sys.stderr, flush=True)
