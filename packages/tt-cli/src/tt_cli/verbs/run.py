"""``tt run``: train, with a recipe, a config, or a recipe file of one's own."""

from contextlib import closing
from dataclasses import replace

import click

from tt_cli.group import ConfigVerb, Invocation, pass_invocation
from tt_cli.names import composed
from tt_cli.options import config_words
from tt_cli.terminal import answer
from tt_train.errors import Interrupted


@click.command("run", cls=ConfigVerb)
@config_words()
@click.option("-o", "--output-dir", metavar="DIR", type=click.Path(), help="Default: runs/<time>-<model>-<method>.")
@click.option(
    "--resume",
    metavar="auto|PATH",
    type=click.Path(),
    help="Continue a run from its newest checkpoint, or from the one named; with -o, in a new run.",
)
@click.option("--dry-run", is_flag=True, help="Load and show everything, and stop before step 1.")
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
    """Train; the last line of stdout is the run directory.

    Words such as optimizer.lr=1e-4 override the config; adapter.rank=8 switches LoRA on, adapter=null off.
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
