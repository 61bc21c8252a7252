"""``tt cat``: a config as a run would see it."""

from dataclasses import replace

import click

from tt_cli.group import ConfigVerb, json_option, print_json
from tt_cli.names import complete_keys, complete_runnable, composed
from tt_cli.terminal import answer


@click.command("cat", cls=ConfigVerb)
@click.argument("what", metavar="RECIPE|CONFIG|FILE.py", shell_complete=complete_runnable)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--config", "config_file", metavar="CONFIG", type=click.Path(), help="A YAML file or registered config.")
@click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Accept components from this module.")
@json_option
def command(
    what: str, overrides: tuple[str, ...], config_file: str | None, allow_import: tuple[str, ...], as_json: bool
) -> None:
    """Show a config with overrides and every default filled in."""
    config = composed(what, config_file, overrides, allow_import, complete=False)
    from tt_train.config import to_dict, to_yaml

    config = replace(config, recipe_sha256=None)  # what is shown is for the recipe file as it will be
    if as_json:
        print_json({"config": to_dict(config)})
    else:
        answer(to_yaml(config).rstrip("\n"))
