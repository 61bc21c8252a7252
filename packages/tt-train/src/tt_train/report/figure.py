"""The report as a picture, for a chat or a pull request. Only drawing imports matplotlib."""

import math
import warnings
from collections.abc import Sequence
from contextlib import chdir
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tt_ckpt.redaction import redact
from tt_train.records.series import charts
from tt_train.report.read import Run, measured, smooth, thin
from tt_train.report.summary import as_count, as_figure, as_percent, as_time, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_PICTURE = "the report has no PNG: it needs matplotlib; pip install matplotlib"
GENERATOR = "tt report"  # in every page and picture, so that they can be told from other files
COLOURS = ("#2f5fd0", "#d9622b", "#16876b", "#a8429b", "#b38600", "#2492b8", "#c2405a", "#6b6f78")
_BUCKETS = 1500  # of the rows of a line, which has about as many points across
INK, SOFT, GRID = "#1b1d21", "#5c626c", "#e8e8e4"


def picture(runs: Sequence[Run]) -> bytes:
    """A PNG: the loss above, learning rate, gradient norm, throughput and memory below."""
    with chdir(Path(__file__).parent):  # its import reads the matplotlibrc of the working folder
        import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a character in the name of a run that is in no font
        matplotlib.rcdefaults()  # a matplotlibrc may ask for TeX, which is a program, or for other fonts
        png = BytesIO()
        _figure(runs).savefig(png, format="png", metadata={"Software": GENERATOR})
    return png.getvalue()


def _figure(runs: Sequence[Run]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = {one.name: one for run in runs for one in run.others}.values()
    drawn = [one for series in charts(others, measured=measured(runs)).values() for one in series]
    panels = [one for one in drawn if one.panel]
    rows = -(-len(panels) // 4)
    height = 7.6 + 2.6 * (rows - 1)  # in inches
    scale = 7.6 / height
    figure = Figure(figsize=(12, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + rows, 4, height_ratios=(1.75, *[1] * rows), hspace=0.32, wspace=0.3)
    grid.update(left=0.055, right=0.98, top=1 - 0.145 * scale, bottom=0.075 * scale)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    figure.text(0.055, 1 - 0.055 * scale, _plain(title), fontsize=17, fontweight="bold", color=INK)
    figure.text(0.055, 1 - 0.092 * scale, _plain(_summary(runs)), fontsize=10.5, color=SOFT)
    _draw_loss(figure.add_subplot(grid[0, :]), runs)
    for place, series in enumerate(panels):
        axes = figure.add_subplot(grid[1 + place // 4, place % 4])
        for index, run in enumerate(runs):
            color = COLOURS[index % len(COLOURS)]
            if not series.dashed:
                _line(axes, run, run.column(series.name), color=color, linewidth=1.4)
                continue
            _draw_held_out(axes, run, series.name, color=color, linewidth=1.4)
            for one in run.others:
                if one.tag and one.name.startswith(f"{series.name}_"):
                    _draw_held_out(axes, run, one.name, color=color, tag=one.tag, linewidth=1.0)
        _dress(axes, _plain(series.panel))
        if series.from_zero:
            highest = max((value for run in runs for value in run.figures(series.name)), default=1.0)
            axes.set_ylim(0, 1.06 * highest or 1.0)
    return figure


def _draw_loss(axes: "Axes", runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        name = _plain(run.name) + ", " if len(runs) > 1 else ""
        color = COLOURS[index % len(COLOURS)]
        losses = run.column("loss")
        if len(losses) > 8:
            _line(axes, run, losses, color=color, linewidth=0.9, alpha=0.3)
            _line(axes, run, smooth(losses), color=color, linewidth=2.0, label=f"{name}train, smoothed")
        else:
            _line(axes, run, losses, color=color, linewidth=1.8, label=f"{name}train")
        _draw_held_out(axes, run, "eval_loss", color=color, label=f"{name}held-out", markersize=4.5)
        for one in run.others:
            if one.chart == "loss":
                _draw_held_out(axes, run, one.name, color=color, tag=one.tag, linewidth=1.0)
    _dress(axes, "Loss")
    axes.set_xlabel("step", color=SOFT, fontsize=8.5, loc="right")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=SOFT)


def _draw_held_out(axes: "Axes", run: Run, name: str, *, color: str, tag: str = "", **style: Any) -> None:
    """A figure of some steps: a mark at each, and at the end the name of the set."""
    if held := run.held(name):
        steps, values = zip(*held, strict=True)
        style = {"markersize": 3.5, "markerfacecolor": "white", **style}
        axes.plot(steps, values, "o:" if tag else "o--", color=color, **style)
        if tag:
            axes.annotate(_plain(tag), held[-1], xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8,
                          color=SOFT)  # fmt: skip


def _line(axes: "Axes", run: Run, values: Sequence[float | None], **style: Any) -> None:
    steps, drawn = run.figures("step"), thin([values], buckets=_BUCKETS)
    known = [math.nan if (value := values[row]) is None else value for row in drawn]
    alone = len(steps) < 3  # a line through one point is invisible
    axes.plot([steps[row] for row in drawn], known, marker="o" if alone else None, markersize=4, **style)


def _dress(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.grid(True, axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0)
    axes.yaxis.set_major_formatter(lambda value, _: as_count(value) if abs(value) >= 1000 else f"{value:.3g}")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _summary(runs: Sequence[Run]) -> str:
    heads = [headline(run) for run in runs]
    if len(runs) > 1:
        held = all(one.eval_last is not None for one in heads)
        last = [as_figure(one.eval_last if held else one.loss_last) for one in heads]
        figures = "   |   ".join(f"{run.name} {figure}" for run, figure in zip(runs, last, strict=True))
        return f"{'held-out' if held else 'training'} loss at the end:   {figures}"
    one = heads[0]
    parts = [f"loss {as_figure(one.loss_first)} to {as_figure(one.loss_last)}"]
    parts += [f"held-out {as_figure(one.eval_last)}"] if one.eval_last is not None else []
    parts += [f"{as_count(one.tokens)} tokens in {as_time(one.seconds)}"] if one.tokens else []
    if one.parameters:
        share = as_percent((one.trainable or 0) / one.parameters)
        parts.append(f"{as_count(one.parameters)} parameters, {share} trained")
    return "   |   ".join(parts)


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return redact(text).replace("$", r"\$")
