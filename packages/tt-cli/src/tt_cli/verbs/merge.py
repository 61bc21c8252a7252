"""``tt merge``: a run as one model that transformers, vLLM and others load."""

from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import (
    base_option,
    chosen_output,
    dry_run_option,
    dtype_option,
    json_option,
    output_option,
    torch_dtype,
)
from tt_cli.terminal import answer, print_json, tell


@click.command(
    "merge",
    cls=Verb,
    examples=[
        "tt merge runs/first -o merged",
        "tt merge runs/first merged-bf16 --dtype bf16 --json",
    ],
)
@click.argument("run", type=click.Path(), shell_complete=complete_runs)
@output_option("Model directory to write.")
@dtype_option("that of each tensor in the base")
@base_option
@dry_run_option
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
    """Write RUN as one Hugging Face model directory, with its adapter merged into the weights.

    The directory is OUTPUT or -o DIR.
    """
    target_folder = chosen_output(output_word, output)
    from tt_train.models.export import export

    done = export(run, target_folder, dtype=torch_dtype(dtype), base=base or None, dry_run=dry_run, tell=tell)
    written = done["path"]
    if as_json:
        print_json({"model": str(written), "dry_run": dry_run})
        return
    if dry_run:
        tell(f"would write a model directory to {written}")
    answer(written)
