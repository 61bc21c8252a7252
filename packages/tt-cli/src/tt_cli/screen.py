"""The screen of ``tt watch``. For that verb alone, which needs it on a terminal only."""

from collections import deque
from itertools import pairwise
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tt_cli.console import Terminal, duration, literal
from tt_train.run.console import held_out_line, named_figures
from tt_train.run.follow import Follower, Look
from tt_train.run.listing import best_of

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_BLOCKS = "_.-=+*#@"
SMOOTHED = 10  # steps


class Screen:
    """What a run does, drawn anew after every look. Words about it stay below, the last few.

    It is the terminal's other screen, as of an editor: a window that changes its width tears no line, and what was
    on the terminal is there again at the end, with the last state below it.
    """

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.notes: deque[str] = deque(maxlen=5)
        self.live = Live(console=self.terminal, auto_refresh=False, screen=True)
        self._drawn: RenderableType = ""

    def __enter__(self) -> "Screen":
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)
        self.terminal.print(self._page_and_notes())

    def show(self, follower: Follower, look: Look) -> None:
        self._drawn = self.page(follower)
        self._draw()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._draw()

    def _draw(self) -> None:
        self.live.update(self._page_and_notes(), refresh=True)

    def _page_and_notes(self) -> Group:
        return Group(self._drawn, *(literal(note, "yellow") for note in self.notes))

    def page(self, follower: Follower) -> RenderableType:
        """The run as a table of names and values."""
        rows = [follower.rows[step] for step in sorted(follower.rows)]
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        said = follower.manifest
        kind = " ".join(str(said[key]) for key in ("recipe", "method") if said.get(key))
        table.add_row("run", literal(f"{follower.path}: {kind} of {said.get('base_model')}"))
        table.add_row("state", literal(f"{follower.state}"))
        if not rows:
            table.add_row("step", "none yet")
            return table
        last = follower.last
        self._add_progress(table, last["step"], said.get("steps_total"), last.get("eta_s"))
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        if losses:
            recent = losses[-SMOOTHED:]
            mean = sum(recent) / len(recent)
            table.add_row("loss", f"{losses[-1]:.4f}; mean of the last {len(recent)}: {mean:.4f}")
            table.add_row("", self._curve(losses))
        for row in [row for row in rows if row.get("eval_loss") is not None][-3:]:
            table.add_row("held-out", literal(f"step {row['step']}: {held_out_line(row)}"))
        best, step = best_of(said, rows)
        if best is not None:
            table.add_row("lowest", f"{best:.4f} at step {step}")
        for name, text in _figures(last):
            table.add_row(name, text)
        if named := [text for text in named_figures(last) if not text.startswith("eval_")]:
            table.add_row("metrics", literal("  ".join(named)))
        return table

    def _add_progress(self, table: Table, step: int, total: int | None, eta: float | None) -> None:
        left = "" if eta is None else f", {duration(eta)} left"
        table.add_row("step", f"{step}/{total}{left}" if total else f"{step}{left}")
        if total:
            table.add_row("", ProgressBar(total=total, completed=step, width=min(60, self.terminal.width - 12)))

    def _curve(self, losses: list[float]) -> Text:
        """The losses so far in as many columns as there are: each column the mean of its steps."""
        width = max(1, min(60, self.terminal.width - 12, len(losses)))
        edges = [len(losses) * column // width for column in range(width + 1)]
        means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, high = min(means), max(means)
        blocks = ASCII_BLOCKS if self.terminal.options.ascii_only else BLOCKS
        scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
        return Text("".join(blocks[round((mean - low) * scale)] for mean in means), style="cyan")


def _figures(row: dict[str, float | None]) -> list[tuple[str, str]]:
    kinds = {"lr": ("rate", ".2e"), "grad_norm": ("gradient", ".3f"), "tokens_per_s": ("tokens/s", ",.0f"),
             "memory_gib": ("memory", ".2f")}  # fmt: skip
    found = [(name, f"{row[key]:{form}}") for key, (name, form) in kinds.items() if row.get(key) is not None]
    found = [(name, f"{text} GiB" if name == "memory" else text) for name, text in found]
    elapsed = row.get("elapsed_s")
    return found if elapsed is None else [*found, ("time", duration(elapsed))]
