"""How the story reaches the reader: the narrative on stderr, the result on stdout."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tt_cli.console import LineConsole, Terminal, TerminalConsole, literal
from tt_cli.terminal import say
from tt_train.run.console import RunFacts

PERIOD = 100  # steps between two lines where there is no progress bar
INDENT = " " * 11


class Narrator:
    """The narrative: parts with a title, commands that one could type, facts."""

    def __init__(self) -> None:
        self.terminal = Terminal(sys.stderr)

    def part(self, title: str, text: str) -> None:
        """The beginning of a part."""
        self.terminal.print(Text.assemble((f"{title:<11}", "bold"), literal(text)), soft_wrap=True)

    def command(self, text: str) -> None:
        """What a user types for what comes now."""
        self.terminal.print(literal(f"{INDENT}$ {text}", style="cyan"), soft_wrap=True)

    def fact(self, text: str) -> None:
        """What came of it."""
        self.terminal.print(literal(f"{INDENT}{text}"), soft_wrap=True)

    def training_console(self) -> LineConsole:
        """What a training stage tells: a progress bar on a terminal, some lines anywhere else."""
        if self.terminal.is_terminal and not self.terminal.is_dumb_terminal:
            return StageBar(self.terminal)
        return StageLines()


class StageBar(TerminalConsole):
    """A run on a terminal, without the table at its end: the story goes on."""

    def end(self, summary: dict[str, Any]) -> None:
        self.close()


class StageLines(LineConsole):
    """A run in plain lines, one of ``PERIOD`` steps."""

    steps_total = 0

    def start(self, facts: RunFacts) -> None:
        self.steps_total = facts.steps_total
        super().start(facts)

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % PERIOD == 0 or row["step"] == self.steps_total:
            super().step(row)

    def note(self, text: str) -> None:
        say(f"{INDENT}{text}", err=True)

    def end(self, summary: dict[str, Any]) -> None:
        """The story tells what came of it."""


def show_scores(scores: Mapping[str, dict[str, float]], *, notes: Mapping[str, str]) -> None:
    """The table on stdout: exact match on unseen questions by kind, of each model; kinds with notes first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("unseen questions")
    for name in scores:
        table.add_column(name, justify="right")
    for kind in dict.fromkeys([*notes, *next(iter(scores.values()))]):
        note = f" ({notes[kind]})" if kind in notes else ""
        style = "bold" if kind in notes else ""
        table.add_row(Text(kind + note), *(percent(model[kind]) for model in scores.values()), style=style)
    Terminal(sys.stdout).print(table)


def show_commands(title: str, lines: list[str]) -> None:
    """Commands on stdout, one a line."""
    terminal = Terminal(sys.stdout)
    terminal.print(Text(f"\n{title}", style="bold"))
    for line in lines:
        terminal.print(literal(f"  {line}", style="cyan"), soft_wrap=True)


def default_root() -> Path:
    """``tt-quickstart`` here, or the next number where that is taken."""
    root, number = Path("tt-quickstart"), 1
    while root.exists():
        number += 1
        root = Path(f"tt-quickstart-{number}")
    return root


def percent(share: float) -> str:
    """A share between 0 and 1 as text."""
    return f"{100 * share:.1f} %"
