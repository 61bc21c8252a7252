"""What is drawn on a terminal with rich: the progress of a run, bars, rows in colour.

Nothing is read as markup, control characters are shown as escapes, and secrets are blanked.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from tt_ckpt.redaction import redact
from tt_cli.marking import mark, shorten
from tt_cli.terminal import Door, is_hushed, say
from tt_train.records.visible import visible
from tt_train.run import console as plain
from tt_train.run.console import RunFacts

SAMPLE_LIMIT = 600  # characters of each trained or untrained stretch of the sample


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


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives ``progress(bytes done, bytes in all)`` for what runs inside; None if stderr is not a terminal, or -q."""
    if not sys.stderr.isatty() or is_hushed():
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


@contextmanager
def count_progress(label: str, total: int) -> Iterator[Callable[[float], None]]:
    """Gives ``advance(count)``, which moves a bar on stderr."""
    columns = (
        TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, terminal=Terminal(sys.stderr), transient=True) as bar:
        task = bar.add_task(visible(label), total=total)
        yield lambda count: bar.advance(task, count)


class LineConsole(plain.Console):
    """tt_train's plain lines; remembers what the run is and where it writes, from the moment that it has begun."""

    run_dir: Path | None = None
    facts: RunFacts | None = None

    def start(self, facts: RunFacts) -> None:
        self.run_dir, self.facts = Path(facts.run_dir), facts
        super().start(facts)

    def end(self, summary: dict[str, Any]) -> None:
        for name, value in summary_rows(summary):
            self.note(f"{name:<15}{value}")
        for command in summary.get("next", []):
            self.note(f"  {command}")

    def close(self) -> None:
        """Stop drawing, whatever happened."""


class QuietConsole(LineConsole):
    """For a rank that does not print: its log has what it would say."""

    def note(self, text: str) -> None:
        logging.getLogger("tt_train").info("%s", text)

    def warn(self, text: str) -> None:
        logging.getLogger("tt_train").warning("%s", text)


class WarningConsole(QuietConsole):
    """For -q: warnings only."""

    def warn(self, text: str) -> None:
        say(f"warning: {text}", err=True)


_BAR_AND_TIME = 16  # columns: four of the bar, ten of the time left, and a blank before each
_BESIDE_FIGURES = 46  # columns of a line of progress: the step, ten of the bar, the time left


class TerminalConsole(LineConsole):
    """The same on a terminal, with rich."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.progress: Bars | None = None
        self.task = TaskID(0)

    def start(self, facts: RunFacts) -> None:
        self.run_dir, self.facts = Path(facts.run_dir), facts
        self._line("model", _model(facts), soft_wrap=False)
        for number, line in enumerate(facts.data):
            self.warn(line) if number else self._line("data", line, soft_wrap=False)
        self._show_sample(facts)
        place = f"{facts.run_dir}{plain.continued(facts)}, on {facts.device}"
        self._line("run", f"{place}, {plain.precision_line(facts)}", soft_wrap=False)
        self.progress = Bars(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            RunEta(),
            terminal=self.terminal,
        )
        self.task = self.progress.add_task(
            "", total=facts.steps_total, completed=facts.step_first, figures="", eta=None
        )
        self.progress.start()

    def step(self, row: dict[str, Any]) -> None:
        if self.progress is None:
            return
        speed = row.get("tokens_per_s")  # absent if the run was stopped before it was measured
        figures = [] if row.get("loss") is None else [f"loss {row['loss']:.4f}"]  # None: nothing was trained on
        named = [text for text in plain.named_figures(row) if not text.startswith("eval_")]
        named.sort(key=lambda text: ("accuracy" not in text, "margin" not in text))  # those that say most come first
        figures += [] if speed is None else [f"{speed:,.0f} tokens/s"]
        place = f"step {row['step']}/{self.facts.steps_total}" if self.facts else ""
        if len("  ".join([place, *figures])) + _BAR_AND_TIME > self.terminal.width:
            del figures[1:]
        room = self.terminal.width - _BESIDE_FIGURES - len("  ".join(figures))
        while named and len("  ".join(named)) + 2 > room:
            named.pop()
        figures[1:1] = named
        self.progress.update(self.task, completed=row["step"], figures="  ".join(figures), eta=row.get("eta_s"))
        if row.get("eval_loss") is not None:
            self.note(f"step {row['step']}: {plain.held_out_line(row)}")

    def note(self, text: str) -> None:
        self.terminal.print(literal(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.terminal.print(Text.assemble(("warning: ", "yellow"), visible(redact(text))), soft_wrap=True)

    def end(self, summary: dict[str, Any]) -> None:
        self.close()
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in summary_rows(summary):
            table.add_row(Text(name, style="dim"), literal(value))
        self.terminal.print()
        self.terminal.print(table)
        self.terminal.print()
        for command in summary.get("next", []):
            self.terminal.print(literal(f"  {command}", style="cyan"), soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _line(self, name: str, text: str, *, soft_wrap: bool = True) -> None:
        self.terminal.print(Text.assemble((f"{name:<6}", "bold"), visible(redact(text))), soft_wrap=soft_wrap)

    def _show_sample(self, facts: RunFacts) -> None:
        if not facts.sample:
            return
        color = self.terminal.color_system is not None and not self.terminal.no_color
        how = "in green" if color else f"between {' and '.join(plain.MARKS)}"
        self._line("row", f"the first one; trained tokens are {how}")
        sample = mark(shorten(facts.sample, limit=SAMPLE_LIMIT), color=color)
        self.terminal.print(Text.from_ansi(sample), soft_wrap=True)


class RunEta(ProgressColumn):
    """How long the rest of the run takes, evaluations and checkpoints included, as its metrics say."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        eta = task.fields.get("eta")
        return Text("" if eta is None else f"{duration(eta)} left", style="dim")


def console_here() -> LineConsole:
    """The rich console when stderr is a terminal, plain lines anywhere else; warnings only if the user said -q."""
    if is_hushed():
        return WarningConsole()
    terminal = Terminal(sys.stderr)
    return TerminalConsole(terminal) if sys.stderr.isatty() and not terminal.is_dumb_terminal else LineConsole()


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The end of a run as (name, value); figures that it does not have are left out."""
    rows = [("steps", f"{summary['steps']:,}")]
    first, last = summary.get("loss_first"), summary.get("loss_last")
    if first is not None and last is not None:
        rows.append(("training loss", f"{last:.4f} ({summary['loss_over']}; {first:.4f} at first)"))
    if summary.get("eval_loss") is not None:
        rows.append(("held-out loss", f"{summary['eval_loss']:.4f}"))
    for name, figures in summary.get("eval_sets", {}).items():
        if figures.get("loss") is not None:
            rows.append((f"  {name}", f"{figures['loss']:.4f}"))
    if summary.get("eval_perplexity") is not None:
        rows.append(("perplexity", f"{summary['eval_perplexity']:.4g}"))
    if summary.get("eval_exact_match") is not None:
        rows.append(("exact match", f"{summary['eval_exact_match']:.4f}"))
    seconds, tokens = summary.get("seconds"), summary.get("tokens")
    if seconds is not None:
        rows.append(("time", duration(seconds)))
    if tokens is not None:
        speed = summary.get("tokens_per_s")
        rate = f" ({speed:,.0f} per second)" if speed else ""
        rows.append(("trained tokens", f"{tokens:,}{rate}"))
    rows.append(("run", str(summary["run_dir"])))
    return rows


def duration(seconds: float) -> str:
    """``1h02m``, ``2m05s`` or ``7s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _model(facts: RunFacts) -> str:
    share = 100 * facts.trainable / max(facts.parameters, 1)
    return (
        f"{facts.model}: {facts.parameters:,} parameters, {facts.trainable:,} trained ({share:.2f} %, {facts.method})"
    )
