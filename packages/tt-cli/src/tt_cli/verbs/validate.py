"""``tt validate``: every mistake that can be known before weights load."""

import click

from tt_cli.group import ConfigVerb, json_option, print_json
from tt_cli.names import complete_keys, complete_runnable, refuse_folder


@click.command("validate", cls=ConfigVerb)
@click.argument("config", shell_complete=complete_runnable)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Accept components from this module.")
@json_option
def command(config: str, overrides: tuple[str, ...], allow_import: tuple[str, ...], as_json: bool) -> None:
    """Check CONFIG (a recipe, a registered config or a YAML file) with overrides: keys, paths, columns, shapes."""
    from tt_train import compose
    from tt_train.validate import check

    refuse_folder(config)
    composed = compose(config, overrides=overrides, allow_import=allow_import)
    job = check(composed)
    if as_json:
        held_out = job.held_out.report if job.held_out else None
        print_json({"config": config, "data": job.train.report, "held_out": held_out, "notes": job.notes})
        return
    for line in [*job.notes, *job.data_lines]:
        click.echo(line, err=True)
    click.echo(f"{config}: no mistakes found")
