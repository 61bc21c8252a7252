"""``tt run``: train, with a recipe, a config, or a recipe file of one's own."""

import importlib
import importlib.util
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from tt_cli.group import ConfigVerb, Invocation, pass_invocation
from tt_cli.names import complete_keys, complete_runnable, refuse_folder
from tt_train.errors import Interrupted

if TYPE_CHECKING:
    from tt_train.config import SFTConfig


@click.command("run", cls=ConfigVerb)
@click.argument("what", metavar="RECIPE|CONFIG|FILE.py", shell_complete=complete_runnable)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--config", "config_file", metavar="CONFIG", type=click.Path(), help="A YAML file or registered config.")
@click.option("-o", "--output-dir", metavar="DIR", type=click.Path(), help="Default: runs/<time>-<model>-<method>.")
@click.option("--resume", metavar="auto|PATH", help="Go on from the run's newest checkpoint, or from this one.")
@click.option("--dry-run", is_flag=True, help="Load and show everything, and stop before step 1.")
@click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Accept components from this module.")
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
    config, recipe = _prepare(what, config_file, overrides, allow_import)
    if output_dir is not None:
        config = replace(config, output_dir=output_dir)
    from tt_cli.console import console_here

    with closing(console_here()) as console:
        try:
            run_dir = recipe.main(config, console=console, resume=resume, dry_run=dry_run)
        except Interrupted:
            click.echo(console.run_dir)
            raise
        finally:
            invocation.run_dir = console.run_dir
    if not dry_run:
        click.echo(run_dir)


def _prepare(
    what: str, config_file: str | None, overrides: tuple[str, ...], allow_import: tuple[str, ...]
) -> tuple["SFTConfig", ModuleType]:
    """The checked config, and the module whose ``main`` takes it."""
    from tt_train import compose, registry

    if what.endswith(".py"):
        module = _load_file(Path(what))
        schema = getattr(module, "Config", None)
        composed = compose("sft", config=config_file, overrides=overrides, allow_import=allow_import, schema=schema)
        return composed, module
    refuse_folder(what)
    for word in overrides:
        if "=" not in word and word.endswith((".yaml", ".yml")):
            raise click.UsageError(f"'{word}' is no KEY=VALUE; did you mean --config {word}?")
    if config_file is not None and what not in registry.RECIPES:
        raise click.UsageError(f"--config belongs to a recipe; '{what}' is a config itself: give one of the two")
    config = compose(what, config=config_file, overrides=overrides, allow_import=allow_import)
    return config, importlib.import_module(f"tt_train.recipes.{config.recipe}")


def _load_file(path: Path) -> ModuleType:
    """A recipe file as a module. Its folder is on no path: it stands alone, or imports what is installed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file (looked in {Path.cwd()}); tt cp sft {path} makes one")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from error
    if not callable(getattr(module, "main", None)):
        raise ValueError(f"{path}: has no function main(config, *, console, resume, dry_run); tt cat {path.stem}")
    return module
