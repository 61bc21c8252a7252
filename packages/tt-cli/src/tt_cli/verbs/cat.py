"""``tt cat``: a config as a run would see it."""

from dataclasses import replace

import click

from tt_cli.group import ConfigVerb
from tt_cli.names import composed
from tt_cli.options import config_words, json_option
from tt_cli.terminal import answer, print_json


@click.command(
    "cat",
    cls=ConfigVerb,
    examples=[
        "tt cat sft",
        "tt cat sft model.path=Qwen/Qwen3-0.6B data.train=rows.jsonl adapter.rank=8",
        "tt cat my.yaml optimizer.lr=1e-4 --json",
    ],
)
@config_words()
@json_option
def command(
    what: str, overrides: tuple[str, ...], config_file: str | None, allow_import: tuple[str, ...], as_json: bool
) -> None:
    """Show a config as a run would use it: with its overrides and every default filled in."""
    config = composed(what, config_file, overrides, allow_import, complete=False)
    from tt_train.config import to_dict, to_yaml

    config = replace(config, recipe_sha256=None)  # what is shown is for the recipe file as it will be
    if as_json:
        print_json({"config": to_dict(config)})
    else:
        answer(to_yaml(config).rstrip("\n"))
