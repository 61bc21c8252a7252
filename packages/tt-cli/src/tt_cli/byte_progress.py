"""A bar for work that is counted in bytes, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tt_cli.drawing import Bars, Terminal
from tt_train.visible import visible


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives ``progress(bytes done, bytes in all)`` for what runs inside; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, terminal=Terminal(sys.stderr), transient=True) as bar:
        task = bar.add_task(visible(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
