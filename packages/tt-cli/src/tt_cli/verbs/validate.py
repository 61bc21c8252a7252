"""``tt validate``: every mistake that can be known before weights load."""

import click

from tt_cli.group import ConfigVerb, json_option, print_json
from tt_cli.names import complete_keys, complete_runnable, composed


@click.command("validate", cls=ConfigVerb)
@click.argument("what", metavar="RECIPE|CONFIG|FILE.py", shell_complete=complete_runnable)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--config", "config_file", metavar="CONFIG", type=click.Path(), help="A YAML file or registered config.")
@click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Accept components from this module.")
@json_option
def command(
    what: str, overrides: tuple[str, ...], config_file: str | None, allow_import: tuple[str, ...], as_json: bool
) -> None:
    """Check a config with overrides: keys, paths, columns, shapes, devices, loggers; all that needs no weights."""
    config = composed(what, config_file, overrides, allow_import)
    from tt_train.validate import check

    job = check(config)
    if as_json:
        held_out = job.held_out.report if job.held_out else None
        print_json({"config": what, "data": job.data_report, "held_out": held_out, "notes": job.notes})
        return
    for line in [*job.notes, *job.data_lines]:
        click.echo(line, err=True)
    click.echo(f"{what}: no mistakes found")
