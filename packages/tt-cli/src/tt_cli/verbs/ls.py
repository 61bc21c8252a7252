"""``tt ls``: what there is to run, to copy, to build and to talk to."""

import sys
from typing import Any

import click

from tt_cli.group import Verb
from tt_cli.names import source_of
from tt_cli.options import json_option
from tt_cli.terminal import print_json, say, wants_color
from tt_train.settings import registry
from tt_train.settings.torchtune import names as torchtune

KINDS = ("recipes", "configs", "models", "runs")


@click.command(
    "ls",
    cls=Verb,
    examples=[
        "tt ls",
        "tt ls runs",
        "tt ls configs --json",
    ],
)
@click.argument("kind", required=False, type=click.Choice(KINDS))
@json_option
def command(kind: str | None, as_json: bool) -> None:
    """List recipes and configs, or one kind of thing; runs are those in ./runs, newest first."""
    found = {name: _LISTS[name]() for name in ((kind,) if kind else ("recipes", "configs"))}
    if as_json:
        print_json(found)
        return
    for name, rows in found.items():
        if kind is None:
            say(click.style(name, bold=True) if wants_color(sys.stdout) else name, styled=True)
        for line in _table(rows, headed=name == "runs") or [f"no {name} here"]:
            click.echo(("" if kind else "  ") + line)


def _recipes() -> list[dict[str, Any]]:
    ours = [{"name": name, "about": _about(source_of(name)[1])} for name in registry.recipe_names()]
    theirs = [
        {"name": name, "about": f"torchtune's; here {recipe}" if recipe else torchtune.ELSEWHERE[name]}
        for name, recipe in torchtune.RECIPES.items()
    ]
    return ours + theirs


def _configs() -> list[dict[str, Any]]:
    """Each with the recipe that it is for."""
    found = []
    for name in registry.config_names():
        text = source_of(name)[1]
        recipe = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("recipe:")), "")
        found.append({"name": name, "recipe": recipe, "about": _about(text)})
    found += [
        {"name": name, "recipe": recipe, "about": torchtune.ELSEWHERE.get(name, "torchtune's config of this name")}
        for name, recipe in torchtune.PAIRS.items()
    ]
    return found


def _about(text: str) -> str:
    """What the first line of a text says of it, in a docstring or a comment."""
    line = text.partition("\n")[0].strip()
    if line.startswith('"""'):
        return line.strip('"').partition(":")[0].rstrip(".")
    return line.strip("# ").partition(". tt run")[0].rstrip(".") if line.startswith("#") else ""


def _models() -> list[dict[str, Any]]:
    import tt_models

    return [{"name": name} for name in tt_models.list_models()]


def _runs() -> list[dict[str, Any]]:
    from tt_train.run.dir import list_runs

    return [dict(run) for run in list_runs("runs")]


_LISTS = {"recipes": _recipes, "configs": _configs, "models": _models, "runs": _runs}


def _table(rows: list[dict[str, Any]], *, headed: bool) -> list[str]:
    """``rows`` as aligned columns, under their names; what is None is left blank."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    cells = [[name.upper() for name in rows[0]], *cells] if headed and rows else cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
