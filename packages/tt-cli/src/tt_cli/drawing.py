"""rich behind the door: what it draws has its control characters spelt out, and no markup is read in it."""

import sys
from collections.abc import Iterable
from typing import TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import Progress, ProgressColumn
from rich.segment import Segment
from rich.text import Text

from tt_cli.terminal import Door
from tt_train.redact import redact
from tt_train.visible import visible


class Terminal(Console):
    """A rich console on a stream. Names such as ``[red]`` and ``:smile:`` are shown as they are."""

    def __init__(self, stream: TextIO, *, width: int | None = None, force_terminal: bool | None = None) -> None:
        raw = stream.raw if isinstance(stream, Door) else stream
        super().__init__(
            file=raw, width=width, force_terminal=force_terminal, highlight=False, markup=False, emoji=False
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def literal(text: str, style: str = "") -> Text:
    """Text as it is, without secrets; rich would leave out its control characters without a word."""
    return Text(visible(redact(text)), style=style)


class Bars(Progress):
    """Progress bars. What others write while they are drawn goes above them, through the door."""

    def __init__(self, *columns: str | ProgressColumn, terminal: Terminal, transient: bool = False) -> None:
        super().__init__(
            *columns,
            console=terminal,
            transient=transient,
            expand=not transient,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # a pipe gets its answer, bars or not
        )

    def start(self) -> None:
        super().start()
        if isinstance(sys.stdout, FileProxy):
            sys.stdout = cast(TextIO, Door(cast(TextIO, sys.stdout), answers=True))
        if isinstance(sys.stderr, FileProxy):
            sys.stderr = cast(TextIO, Door(cast(TextIO, sys.stderr), answers=False))
