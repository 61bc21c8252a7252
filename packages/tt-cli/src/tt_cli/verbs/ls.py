"""``tt ls``: what there is to run, to copy, to build and to talk to."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import click

from tt_cli.group import Verb
from tt_cli.names import source_of
from tt_cli.options import json_option
from tt_cli.terminal import print_json, say, tell, wants_color
from tt_train.errors import did_you_mean
from tt_train.records.visible import visible
from tt_train.settings import registry
from tt_train.settings.torchtune import names as torchtune

KINDS = ("recipes", "configs", "models", "runs")
# columns that a narrow terminal leaves out, in this order
_LEAST = ("changed", "recipe", "size", "method", "loss", "base", "held-out", "tt eval")
SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {  # the list is in the order of time
    "time": lambda run: 0,
    "loss": lambda run: tuple((run[key] is None, run[key]) for key in ("best_eval_loss", "loss")),
    "size": lambda run: -run["bytes"],
}
STATES = ("running", "stopped", "failed", "dead", "finished", "damaged")  # as tt_train.run.listing, which is slow


def _one_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


@click.command(
    "ls",
    cls=Verb,
    examples=[
        "tt ls",
        "tt ls configs --json",
        "tt ls runs --sort loss --recipe sft --base qwen3",
        "tt ls runs --status stopped",
    ],
)
@click.argument("kind", required=False, type=click.Choice(KINDS))
@click.option(
    "--sort",
    type=click.Choice(list(SORTS)),
    help="Order of runs: newest (the default), lowest held-out loss, or largest first.",
)
@click.option("--recipe", metavar="NAME", help="Only runs of this recipe.")
@click.option("--base", metavar="TEXT", help="Only runs whose base model has TEXT in its name.")
@click.option("--status", type=click.Choice(STATES), metavar="STATE", help=f"Only runs that are {_one_of(STATES)}.")
@json_option
def command(
    kind: str | None, sort: str | None, recipe: str | None, base: str | None, status: str | None, as_json: bool
) -> None:
    """List recipes and configs, or one kind of thing; runs are those in ./runs.

    The loss of a run is its training loss over the last epoch or the last steps; HELD-OUT is its lowest held-out loss.
    TT EVAL is the first figure of its newest evaluation by tt eval, and how many more there are.
    """
    given = {"--sort": sort, "--recipe": recipe, "--base": base, "--status": status}
    if kind != "runs" and (option := next((name for name, value in given.items() if value is not None), None)):
        raise click.UsageError(f"{option} is for runs; did you mean tt ls runs {option} ...?")
    found = {name: _LISTS[name]() for name in ((kind,) if kind else ("recipes", "configs"))}
    if kind == "runs":
        found = {"runs": _chosen(found["runs"], sort or "time", recipe=recipe, base=base, status=status)}
    if as_json:
        print_json(found)
        return
    for name, rows in found.items():
        if kind is None:
            say(click.style(name, bold=True) if wants_color(sys.stdout) else name, styled=True)
        shown = _fitting(_in_columns(rows)) if name == "runs" else rows
        filtered = any(value is not None for option, value in given.items() if option != "--sort")
        nothing = f"no such {name} here" if filtered else f"no {name} here"
        for line in _table(shown, headed=name in ("runs", "configs")) or [nothing]:
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
    from tt_train.run.listing import list_runs

    return [dict(run) for run in list_runs("runs")]


def _chosen(
    runs: list[dict[str, Any]], sort: str, *, recipe: str | None, base: str | None, status: str | None
) -> list[dict[str, Any]]:
    if recipe is not None and recipe not in registry.RECIPES and all(run["recipe"] != recipe for run in runs):
        raise ValueError(f"--recipe: no recipe '{recipe}'{did_you_mean(recipe, registry.RECIPES)} (`tt ls recipes`)")
    wanted = {recipe, registry.RECIPES.get(recipe or "")}
    kept = [
        run
        for run in runs
        if (recipe is None or run["recipe"] in wanted)
        and (base is None or base.lower() in (run["model"] or "").lower())
        and status in (None, run["state"])
    ]
    return sorted(kept, key=SORTS[sort])


def _in_columns(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs for people; without the column of evaluations if none has any."""
    rows = [_row(run) for run in runs]
    evaluated = any(row["tt eval"] for row in rows)
    return [{key: value for key, value in row.items() if evaluated or key != "tt eval"} for row in rows]


def _fitting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the columns that say least, if the terminal is too narrow for all of them."""
    width, left_out = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize, list[str]()
    for name in _LEAST:
        if max(map(len, _table(rows, headed=True)), default=0) <= width:
            break
        left_out.append(name.upper())
        rows = [{key: value for key, value in row.items() if key != name} for row in rows]
    if left_out:
        tell(f"left out, since the terminal is narrow: {', '.join(left_out)} (--json has them)")
    return rows


def _row(run: dict[str, Any]) -> dict[str, Any]:
    """The end of a long base, steps of how many, the first figure of the newest evaluation, a size with its unit."""
    from tt_ckpt.shown import format_size

    model, step, total = run["model"] or "", run["step"], run["steps_total"]
    held_out = None if run["best_eval_loss"] is None else f"{run['best_eval_loss']:.4f} at {run['best_step']}"
    return {
        "path": run["path"],
        "recipe": run["recipe"],
        "method": run["method"],
        "base": "/".join(PurePath(model).parts[-2:]) if len(model) > 30 else model,
        "state": run["state"],
        "step": f"{step}/{total}" if step is not None and total is not None else step,
        "held-out": held_out,
        "loss": run["loss"],
        "tt eval": _first_figure(run["evaluation"]),
        "size": format_size(run["bytes"]),
        "changed": run["changed"][:16].replace("T", " "),
    }


def _first_figure(evaluation: list[dict[str, Any]]) -> str | None:
    if not evaluation:
        return None
    first, *rest = evaluation
    more = f" +{len(rest)}" if rest else ""
    return visible(f"{first['task']} {first['metric']} {first['value']:.4f}{more}")


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
