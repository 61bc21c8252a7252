"""``tt quantize``: a run or model in 8 or 4 bits."""

from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.options import (
    AT_LEAST_ONE,
    base_option,
    chosen_output,
    dry_run_option,
    dtype_option,
    json_option,
    output_option,
)
from tt_cli.options import torch_dtype as as_torch
from tt_cli.terminal import answer, print_json, tell


@click.command(
    "quantize",
    cls=Verb,
    examples=[
        "tt quantize runs/first -o small --to int8",
        "tt quantize Qwen/Qwen3-0.6B -o small --to int4 --data rows.jsonl --json",
        "tt quantize --list",
    ],
)
@click.argument("model", required=False, metavar="RUN|MODEL", type=click.Path())
@output_option("Model directory to write.")
@click.option(
    "--to",
    metavar="FORMAT",
    show_default="what a qat run was trained for",
    help="Format of the weights: int8, int8-dynamic, int4, fp8 or another one that --list shows.",
)
@click.option(
    "--group-size",
    type=AT_LEAST_ONE,
    metavar="N",
    show_default="128, 64 or 32",
    help="Inputs that share a scale, in formats with groups.",
)
@click.option(
    "--data",
    metavar="ROWS",
    show_default="a fixed text",
    help="Rows to measure perplexity and agreement with, as data.train takes them; the first 64.",
)
@dtype_option("that of most weights")
@base_option
@click.option("--list", "listing", is_flag=True, help="Try every format on this machine and show what runs.")
@dry_run_option
@json_option
def command(
    model: str | None,
    output_word: Path | None,
    output: Path | None,
    to: str | None,
    group_size: int | None,
    data: str | None,
    dtype: str | None,
    base: tuple[str, ...],
    listing: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write RUN or MODEL with its linear layers in 8 or 4 bits, and report what that cost.

    The directory is OUTPUT or -o DIR. tt, transformers and vLLM load it. Adapters are merged first.
    """
    if listing:
        _list(as_json)
        return
    if model is None:
        raise click.UsageError("no model: name a run or a model, as in tt quantize RUN -o DIR --to int8")
    target = chosen_output(output_word, output)
    from tt_train.models.quantize import quantize_run, serve_commands

    done = quantize_run(
        model, target, to=to, group_size=group_size, dtype=as_torch(dtype), data=data, base=base or None,
        dry_run=dry_run, tell=tell,
    )  # fmt: skip
    if as_json:
        print_json(done)
        return
    if dry_run:
        tell(f"would write {done['format']} to {target}")
    for line in [] if dry_run else serve_commands(target):
        tell(f"  {line}")
    answer(done["path"])


def _list(as_json: bool) -> None:
    import torch

    from tt_train.quantized.trial import trials

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = trials(device)
    if as_json:
        print_json({"device": str(device), "formats": rows})
        return
    width = max(len(row["format"]) for row in rows)
    for row in rows:
        runs = "runs" if row["runs"] else f"does not run here: {row['problem']}"
        click.echo(f"{row['format']:{width}}  {row['about']} ({runs})")
