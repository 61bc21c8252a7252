"""``tt cp``: own a recipe or a config."""

import os
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runnable, source_of
from tt_cli.options import dry_run_option, json_option
from tt_cli.terminal import answer, print_json, tell
from tt_train.errors import counted, shell_word


@click.command(
    "cp",
    cls=Verb,
    examples=[
        "tt cp sft my_sft.py",
        "tt cp smollm2/135m_lora configs/ --make-parents",
    ],
)
@click.argument("name", shell_complete=complete_runnable)
@click.argument("destination", type=click.Path())
@click.option("-n", "--no-clobber", is_flag=True, help="Keep an existing file, and exit with 0.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing file.")
@click.option("--make-parents", is_flag=True, help="Create the missing folders of DESTINATION.")
@dry_run_option
@json_option
def command(
    name: str, destination: str, no_clobber: bool, force: bool, make_parents: bool, dry_run: bool, as_json: bool
) -> None:
    """Copy the recipe or config NAME to DESTINATION, a file or a folder, and print the path of the copy.

    A name without a suffix gets .py for a recipe and .yaml for a config. An existing file is an error.
    """
    if no_clobber and force:
        raise click.UsageError("-n keeps a file and -f replaces it; give only one of them", click.get_current_context())
    source, text = source_of(name)
    target = _target(destination, source)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file in it")
    if not target.parent.is_dir() and not make_parents:
        raise FileNotFoundError(f"no folder {target.parent} to copy {name} to; --make-parents creates it")
    exists = os.path.lexists(target)
    if exists and not no_clobber and not force:
        raise FileExistsError(
            f"{target} exists; name another file, or replace it: tt cp -f {name} {shell_word(destination)}"
        )
    kept = exists and no_clobber
    if not kept and not dry_run:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"file": str(target), "copied": not kept, "dry_run": dry_run})
    elif kept:
        tell(f"{target} exists and {'would be' if dry_run else 'was'} kept")
    else:
        if dry_run:
            tell(f"would {'replace' if exists else 'write'} {target} ({counted(len(text.splitlines()), 'line')})")
        answer(target)


def _target(destination: str, source: str) -> Path:
    target = Path(destination)
    if target.is_dir() or destination.endswith(("/", os.sep)):
        return target / source
    return target if target.suffix else target.with_name(target.name + Path(source).suffix)
