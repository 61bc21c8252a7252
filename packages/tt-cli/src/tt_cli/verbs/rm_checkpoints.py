"""``tt rm-checkpoints``: free the space of a run's checkpoints, never its result."""

from dataclasses import asdict
from pathlib import Path

import click

from tt_ckpt.shown import format_size
from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import COUNT, dry_run_option, json_option
from tt_cli.terminal import answer, print_json, tell
from tt_train.errors import counted


@click.command(
    "rm-checkpoints",
    cls=Verb,
    examples=[
        "tt rm-checkpoints runs/first --dry-run",
        "tt rm-checkpoints runs/first --keep-last 1",
    ],
)
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_runs)
@click.option(
    "--keep-last", type=COUNT, metavar="N", default=0, show_default=True, help="Keep the newest N checkpoints."
)
@click.option("--keep-best", is_flag=True, help="Keep the checkpoint of the step with the lowest held-out loss.")
@dry_run_option
@json_option
def command(run: Path, keep_last: int, keep_best: bool, dry_run: bool, as_json: bool) -> None:
    """Remove the checkpoints of RUN, which only resuming needs, and print the paths of those removed.

    The adapter or model, the figures and the report stay. A run that is being written is refused, and so is one without
    a result that would lose its last checkpoint.
    """
    from tt_train.records.run_files import FinishedRun
    from tt_train.run.dir import find_run
    from tt_train.run.space import remove_checkpoints

    freed = remove_checkpoints(FinishedRun(find_run(run)), keep_last=keep_last, keep_best=keep_best, dry_run=dry_run)
    if as_json:
        print_json(asdict(freed))
        return
    would, kept = "would free" if dry_run else "freed", ", ".join(freed.kept) or "none"
    tell(f"{would} {format_size(freed.bytes)} of {counted(len(freed.removed), 'checkpoint')}; kept: {kept}")
    for name in freed.removed:
        answer(run / "checkpoints" / name)
