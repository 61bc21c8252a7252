"""``tt eval``: what a run or model is worth, on tasks of lm-evaluation-harness or on rows of one's own."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tt_cli.group import Invocation, Verb
from tt_cli.options import AT_LEAST_ONE, COUNT, SEED, TOKENS, Number, base_option, device_option, json_option
from tt_cli.terminal import print_json, say, tell, tell_rows
from tt_train.errors import ConfigError, LostRank

if TYPE_CHECKING:
    from tt_train.evals.models import Report

WAIT_S = 86_400.0  # for rank 0, which may load tasks or compute metrics while the others wait


class EvalVerb(Verb):
    """A verb that its processes run again without ``--nproc``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = [word for before, word in zip(("", *args), args, strict=False)
                             if "--nproc" not in (before, word.partition("=")[0])]  # fmt: skip
        return super().parse_args(ctx, args)


@click.command(
    "eval",
    cls=EvalVerb,
    examples=[
        "tt eval runs/first --data rows.jsonl",
        "tt eval Qwen/Qwen3-0.6B runs/first --tasks my_task --include-path tasks",
        "tt eval --data rows.jsonl --metric my_metrics:f1 --allow-import my_metrics",
    ],
)
@click.argument("models", nargs=-1, metavar="[RUN|MODEL]...", type=click.Path())
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness, separated by commas.")
@click.option("--data", metavar="ROWS", help="Rows in any format that training reads: held-out loss and exact match.")
@click.option(
    "--limit",
    type=Number(click.FloatRange(0, 10**9, min_open=True)),
    metavar="N",
    help="Use only N rows of each task; below 1: this share of them.",
)
@click.option(
    "--num-fewshot",
    type=COUNT,
    metavar="K",
    show_default="that of the task",
    help="Number of solved examples in front of each question.",
)
@click.option(
    "--include-path",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with task files (YAML) of your own. Python that they name is run. Can be repeated.",
)
@click.option(
    "--batch-size",
    type=AT_LEAST_ONE,
    metavar="N",
    show_default="by number of tokens",
    help="Number of texts read at once.",
)
@click.option(
    "--max-length",
    type=TOKENS,
    metavar="N",
    show_default="the model's",
    help="Maximum number of tokens of a text; longer ones lose their beginning.",
)
@click.option("--apply-chat-template", is_flag=True, help="Ask in the model's chat template.")
@click.option(
    "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
    default=True,
    show_default=True,
    help="Give solved examples as earlier turns of the chat.",
)
@click.option("--system", metavar="TEXT", help="System message of every prompt.")
@click.option(
    "--gen-kwargs", metavar="K=V,...", help="Change how tasks generate, as in max_gen_toks=64,temperature=0.7."
)
@click.option("--seed", type=SEED, metavar="N", show_default="lm-eval's", help="Random seed of examples and answers.")
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run code which the model writes.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="MODULE:FUNCTION",
    help="With --data: your function of (prompts, answers, expected). Can be repeated.",
)
@click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Allow --metric to import this module.")
@click.option(
    "--max-new-tokens",
    type=TOKENS,
    metavar="N",
    show_default="8 more than the longest expected answer",
    help="Maximum number of new tokens.",
)
@click.option("--no-adapter", is_flag=True, help="Use the base model of a run, without its adapter.")
@base_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    show_default="that of the run or files",
    help="Data type to compute in.",
)
@click.option("--nproc", metavar="N|auto|gpu", help="Number of processes that share the work, one per GPU.")
@click.option(
    "-o",
    "--output",
    metavar="FILE.json",
    type=click.Path(path_type=Path),
    show_default="evals/ in each run",
    help="File to write the results to.",
)
@click.option("--log-samples", is_flag=True, help="Also write each question and answer (jsonl).")
@json_option
@click.pass_context  # fmt: skip
def command(ctx: click.Context, /, nproc: str | None, **asked: Any) -> int | None:
    """Evaluate RUN or MODEL (default: the newest run), or several side by side.

    --tasks runs lm-evaluation-harness (pip install lm-eval); values are those of its own hf model. --data
    needs only tt.
    """
    from tt_train.devices import launch

    if (asked["tasks"] is None) == (asked["data"] is None):
        raise click.UsageError("give either --tasks NAMES or --data ROWS", ctx)
    _refuse_idle(ctx, asked)
    here = launch.place()
    if nproc not in (None, "1"):
        if here is not None:
            raise click.UsageError("this process is a rank already; leave out --nproc", ctx)
        from tt_cli import agent

        _check(asked)
        return agent.start(agent.asked_for([], nproc), ["eval", *ctx.meta["words"]], None)
    if here is None or here.size == 1:
        _check(asked)
        _evaluate(asked)
        return None
    from tt_train.inputs.components import pick_device

    ctx.ensure_object(Invocation).rank = here.rank
    store = launch.meet(here)
    device = launch.everywhere(lambda: pick_device(asked["device"]), met=(here, store))
    with launch.joined(here, store, device_type=device.type, timeout_s=WAIT_S):
        try:
            _evaluate(asked)
        except RuntimeError as error:
            if launch.is_lost(error):
                raise LostRank(launch.ending(0, error)) from error
            raise
    return None


def _refuse_idle(ctx: click.Context, asked: dict[str, Any]) -> None:
    """UsageError for an option that would do nothing."""
    only = {
        "tasks": ("num_fewshot", "include_path", "apply_chat_template", "system", "gen_kwargs", "seed",
                  "confirm_run_unsafe_code", "fewshot_as_multiturn"),
        "data": ("metrics", "allow_import", "max_new_tokens"),
    }  # fmt: skip
    other = "data" if asked["tasks"] is not None else "tasks"
    for name in only[other]:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = next(param.opts[0] for param in ctx.command.params if param.name == name)
            raise click.UsageError(f"{option} is for --{other}; leave it out", ctx)
    if asked["data"] is not None and asked["limit"] is not None and asked["limit"] % 1:
        raise click.UsageError("--limit: with --data a whole number of rows", ctx)
    if asked["output"] is not None and asked["output"].is_dir():
        raise click.UsageError(f"-o: {asked['output']} is a folder; name a file in it", ctx)


def _check(asked: dict[str, Any]) -> None:
    """ConfigError for models that are not there and results that cannot be written."""
    from tt_train.evals.models import check_models, check_places

    check_places(check_models(_models(asked), asked["base"]), asked["output"], samples=asked["log_samples"])


def _models(asked: dict[str, Any]) -> list[str]:
    from tt_train.run.dir import find_run

    return list(asked["models"]) or [str(find_run())]


def _evaluate(asked: dict[str, Any]) -> None:
    """As one process or as a rank; rank 0 prints."""
    from tt_train.devices.distributed import world
    from tt_train.evals.models import write
    from tt_train.evals.results import as_rows, table
    from tt_train.evals.score import ModelOptions

    options = ModelOptions(
        device=asked["device"], dtype=asked["dtype"], base=asked["base"], adapter=not asked["no_adapter"],
        batch_size=asked["batch_size"], max_length=asked["max_length"],
    )  # fmt: skip
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(f"note: {text}", err=True)

    with _progress() as progress:
        run = _on_tasks if asked["tasks"] is not None else _on_rows
        reports = run(asked, options, tell=note if world().is_main else notes.append, progress=progress)
    if not world().is_main:
        return
    written = write(reports, options, asked["output"], samples=asked["log_samples"])
    figures = {report.model: report.figures for report in reports}
    if asked["as_json"]:
        print_json({"results": as_rows(figures), "notes": notes, "files": [str(path) for path in written]})
        return
    for line in _aligned(table(figures)):
        say(line)
    for path in written:
        tell(str(path))
    if not written:
        tell("the results are not kept: -o FILE.json writes them")


def _on_tasks(asked: dict[str, Any], options: Any, **streams: Any) -> "list[Report]":
    from tt_train.evals.models import on_tasks
    from tt_train.evals.tasks import Settings

    settings = Settings(
        tasks=tuple(name for name in asked["tasks"].split(",") if name.strip()),
        limit=asked["limit"], num_fewshot=asked["num_fewshot"], include_path=asked["include_path"],
        apply_chat_template=asked["apply_chat_template"], fewshot_as_multiturn=asked["fewshot_as_multiturn"],
        system_instruction=asked["system"], gen_kwargs=asked["gen_kwargs"], seed=asked["seed"],
        confirm_run_unsafe_code=asked["confirm_run_unsafe_code"], log_samples=asked["log_samples"],
    )  # fmt: skip
    if not settings.tasks:
        raise ConfigError(["--tasks: no name is given; lm_eval ls tasks lists them"])
    return on_tasks(_models(asked), settings, options, **streams)


def _on_rows(asked: dict[str, Any], options: Any, **streams: Any) -> "list[Report]":
    from tt_train.evals.models import on_rows
    from tt_train.evals.rows import Rows, find_metrics
    from tt_train.settings.registry import finding_modules_here

    with finding_modules_here(asked["allow_import"]):  # a metric may import late
        rows = Rows(
            source=asked["data"],
            limit=None if asked["limit"] is None else int(asked["limit"]),
            metrics=find_metrics(asked["metrics"], asked["allow_import"]),
            max_new_tokens=asked["max_new_tokens"],
        )
        return on_rows(_models(asked), rows, options, tell_rows=tell_rows, **streams)


@contextmanager
def _progress() -> "Iterator[Callable[[str, int, int], None]]":
    """A bar for each kind of work, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from tt_cli.console import Bars, Terminal

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} batches"),
               TimeRemainingColumn())  # fmt: skip
    with Bars(*columns, terminal=Terminal(sys.stderr), transient=True) as bars:
        known: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield progress


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
