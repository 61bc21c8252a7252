"""``tt run``: train, with a recipe, a config, or a recipe file of one's own."""

from contextlib import closing
from dataclasses import replace

import click

from tt_cli.group import ConfigVerb, Invocation, pass_invocation
from tt_cli.names import composed
from tt_cli.options import config_words
from tt_cli.terminal import answer
from tt_train.errors import Interrupted


@click.command(
    "run",
    cls=ConfigVerb,
    examples=[
        "tt run sft model.path=Qwen/Qwen3-0.6B data.train=rows.jsonl adapter.rank=8",
        "tt run my_sft.py --config my.yaml optimizer.lr=1e-4 -o runs/mine",
        "tt run runs/first/config.yaml -o runs/first --resume auto",
    ],
)
@config_words()
@click.option(
    "-o",
    "--output-dir",
    metavar="DIR",
    type=click.Path(),
    show_default="runs/<time>-<model>-<method>",
    help="Run directory to write.",
)
@click.option(
    "--resume",
    metavar="auto|PATH",
    type=click.Path(),
    help="Continue a run: auto takes the newest checkpoint of the run at -o or of this config; PATH is a run or one of "
    "its checkpoints. PATH with -o starts a new run from there.",
)
@click.option("--dry-run", is_flag=True, help="Load everything, print what would be trained, and stop before step 1.")
@pass_invocation
def command(
    invocation: Invocation,
    what: str,
    overrides: tuple[str, ...],
    config_file: str | None,
    output_dir: str | None,
    resume: str | None,
    dry_run: bool,
    allow_import: tuple[str, ...],
) -> None:
    """Train a model with a recipe, a config or your own recipe file.

    KEY=VALUE words such as optimizer.lr=1e-4 override the config. adapter.rank=8 trains LoRA; adapter=null trains the
    whole model. The last line of stdout is the run directory.
    """
    config = composed(what, config_file, overrides, allow_import)
    from tt_train.keys.paths import home
    from tt_train.recipe_file import recipe_of
    from tt_train.registry import finding_modules_here

    recipe = recipe_of(config)
    if output_dir is not None:
        config = replace(config, output_dir=home(output_dir))
    from tt_cli.console import console_here

    with closing(console_here()) as console, finding_modules_here(allow_import):  # a recipe may import late
        try:
            run_dir = recipe.main(config, console=console, resume=resume, dry_run=dry_run)
        except Interrupted:
            if console.run_dir is not None:  # else it was stopped before there was anything to say
                answer(console.run_dir)
            raise
        finally:
            invocation.run_dir = console.run_dir
    if not dry_run:
        answer(run_dir)
