"""``tt quickstart``: the whole story on data of its own, with no network and no model."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tt_cli.group import Invocation, Verb, pass_invocation
from tt_cli.options import SEED, json_option
from tt_cli.terminal import print_json

if TYPE_CHECKING:
    from tt_cli.quickstart.commands import Scale
    from tt_cli.quickstart.story import Outcome

THREADS = 1  # two are up to twice as fast on idle cores, but several times slower on busy ones, and sum otherwise


@click.command(
    "quickstart",
    cls=Verb,
    examples=[
        "tt quickstart",
        "tt quickstart -o my-quickstart --seed 1",
    ],
)
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    show_default="./tt-quickstart",
    help="New directory to write.",
)
@click.option(
    "--seed", type=SEED, metavar="N", default=0, show_default=True, help="Random seed of the rows and the weights."
)
@json_option
@pass_invocation
def command(invocation: Invocation, output_dir: Path | None, seed: int, as_json: bool) -> int:
    """Make rows, a tokenizer and a small base model, fine-tune the model on a task that is new to it, and score it.

    Then train it to prefer right answers to its own wrong ones, and score it again. Takes about two minutes of CPU
    time on one core. The exit code is 1 if the model did not learn the task, or did not learn from the preferences.
    """
    from tt_cli.errors import DONE, FAILED
    from tt_cli.quickstart.commands import Scale

    began = time.perf_counter()
    root = _new_folder(output_dir)
    invocation.run_dir = root
    scale = Scale()
    outcome = _on_one_core(root, seed, scale)
    seconds = round(time.perf_counter() - began, 1)
    if as_json:
        print_json(_as_json(outcome, root, seconds))
    else:
        _show(outcome, root, scale, seconds)
    return FAILED if outcome.shortfalls else DONE


def _new_folder(wanted: Path | None) -> Path:
    from tt_cli.quickstart.narrator import default_root

    root = wanted or default_root()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not empty; name a new folder with -o DIR")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _on_one_core(root: Path, seed: int, scale: "Scale") -> "Outcome":
    import torch

    from tt_cli.quickstart.narrator import Narrator
    from tt_cli.quickstart.story import tell

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return tell(root, seed=seed, scale=scale, narrator=Narrator())
    finally:
        torch.set_num_threads(threads)


def _as_json(outcome: "Outcome", root: Path, seconds: float) -> dict[str, Any]:
    facts = {"ok": not outcome.shortfalls, "errors": outcome.shortfalls, "output_dir": str(root), "seconds": seconds}
    return {**facts, **asdict(outcome)}


def _show(outcome: "Outcome", root: Path, scale: "Scale", seconds: float) -> None:
    from tt_cli.quickstart import commands, narrator
    from tt_cli.quickstart.rows import PREFERRED, TARGET

    click.echo()
    scores = {"base": outcome.before, "with adapter": outcome.after, "with preferences": outcome.preferred}
    narrator.show_scores(scores, notes={TARGET: "the adapter's task", PREFERRED: "the preferences'"})
    if any(outcome.after[kind] < score for kind, score in outcome.before.items()):
        click.echo(
            f"The adapter was trained on {TARGET} alone and lost other tasks; the first two commands below keep them."
        )
    if any(outcome.preferred[kind] < score for kind, score in outcome.after.items()):
        click.echo(f"The preferences were about {PREFERRED} letters alone, and other tasks lost by them.")
    folders = commands.Folders(root)
    narrator.show_commands("What to try next", commands.go_on(folders, scale, outcome.question, seed=outcome.seed))
    narrator.show_commands("The same on a model of your own", commands.on_your_own(folders, scale))
    for line in outcome.shortfalls:
        click.echo(f"error: {line}", err=True)
    click.echo(f"\n{'FAILED' if outcome.shortfalls else 'Done'} after {seconds:.0f} s; everything is in {root}")
