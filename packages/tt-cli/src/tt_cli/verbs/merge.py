"""``tt merge``: a run as one model that transformers, vLLM and others load."""

from pathlib import Path

import click

from tt_cli.basing import base_option, tell
from tt_cli.destination import chosen_output, takes_output
from tt_cli.group import Verb, json_option, print_json
from tt_cli.terminal import answer


@click.command("merge", cls=Verb)
@click.argument("run", type=click.Path())
@takes_output("The model directory to write.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Data type of the weights written; default: each as in the files of the base.",
)
@base_option
@click.option("--dry-run", is_flag=True, help="Find out whether it can be done, and write nothing.")
@json_option
def command(
    run: str,
    output_word: Path | None,
    output: Path | None,
    dtype: str | None,
    base: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write RUN as one Hugging Face model directory, its adapter merged into the weights."""
    target_folder = chosen_output(output_word, output)
    import torch

    from tt_train.models.export import export

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    written = export(
        run, target_folder, dtype=dtypes[dtype] if dtype else None, base=base or None, dry_run=dry_run, tell=tell
    )["path"]
    if as_json:
        print_json({"model": str(written)})
    else:
        answer(written)
