"""``tt cat``: a config as a run would see it."""

import click

from tt_cli.group import ConfigVerb, json_option, print_json
from tt_cli.names import complete_keys, complete_runnable, refuse_folder


@click.command("cat", cls=ConfigVerb)
@click.argument("config", shell_complete=complete_runnable)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Accept components from this module.")
@json_option
def command(config: str, overrides: tuple[str, ...], allow_import: tuple[str, ...], as_json: bool) -> None:
    """Show CONFIG (a recipe, a registered config or a YAML file) with overrides and every default filled in."""
    from tt_train import compose
    from tt_train.config import to_dict, to_yaml

    refuse_folder(config)
    composed = compose(config, overrides=overrides, allow_import=allow_import, complete=False)
    if as_json:
        print_json({"config": to_dict(composed)})
    else:
        click.echo(to_yaml(composed).rstrip("\n"))
