"""``tt merge``: a run as one model that transformers, vLLM and others load."""

from pathlib import Path

import click

from tt_cli.destination import chosen_output, takes_output
from tt_cli.group import Verb, json_option, print_json


@click.command("merge", cls=Verb)
@click.argument("run", type=click.Path())
@takes_output("The model directory to write.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Of the weights written; default: as they are.")
@click.option("--dry-run", is_flag=True, help="Find out whether it can be done, and write nothing.")
@json_option
def command(
    run: str, output_word: Path | None, output: Path | None, dtype: str | None, dry_run: bool, as_json: bool
) -> None:
    """Write RUN as one Hugging Face model directory, its adapter merged into the weights."""
    target_folder = chosen_output(output_word, output)
    import torch

    from tt_train.export import export

    def tell(text: str) -> None:
        click.echo(text, err=True)

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    written = export(run, target_folder, dtype=dtypes[dtype] if dtype else None, dry_run=dry_run, tell=tell)["path"]
    if as_json:
        print_json({"model": str(written)})
    else:
        click.echo(written)
