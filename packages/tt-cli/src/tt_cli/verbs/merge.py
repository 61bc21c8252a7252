"""``tt merge``: a run as one model that transformers, vLLM and others load."""

from pathlib import Path

import click

from tt_cli.group import Verb, json_option, print_json


@click.command("merge", cls=Verb)
@click.argument("run", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The model directory to write.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Of the weights written; default: as they are.")
@json_option
def command(run: str, output: Path, dtype: str | None, as_json: bool) -> None:
    """Write RUN as one Hugging Face model directory, its adapter merged into the weights."""
    import torch

    import tt_train

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    written = tt_train.merge_run(run, output, dtype=dtypes[dtype] if dtype else None)
    if as_json:
        print_json({"model": str(written)})
    else:
        click.echo(written)
