"""``tt report``: what a run did, on one page."""

from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import json_option
from tt_cli.terminal import answer, print_json, say


@click.command(
    "report",
    cls=Verb,
    examples=[
        "tt report",
        "tt report runs/first runs/second -o comparison.html",
    ],
)
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path), shell_complete=complete_runs)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    show_default="report.html in the first run",
    help="HTML page to write; the PNG is written beside it.",
)
@json_option
def command(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Write a self-contained HTML page and a PNG about RUN (default: the newest run), or comparing several runs."""
    from tt_train.report import write_report
    from tt_train.run.dir import find_run

    html, png = write_report([find_run(run) for run in runs or (None,)], output, tell=_warn)
    if as_json:
        print_json({"html": str(html), "png": None if png is None else str(png)})
    else:
        answer(str(html) if png is None else f"{html}\n{png}")


def _warn(text: str) -> None:
    say(f"warning: {text}", err=True)
