"""``tt export``: a model in the form that another program reads, and the commands to run it there."""

from pathlib import Path

import click

from tt_cli.basing import base_option, tell
from tt_cli.destination import chosen_output, takes_output
from tt_cli.group import Verb, json_option, print_json
from tt_cli.terminal import answer


@click.command("export", cls=Verb)
@click.argument("run", type=click.Path())
@takes_output("The directory to write.")
@click.option("--to", "target", default="hf", show_default=True, help="hf (vLLM, llama.cpp, transformers) or ollama.")
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
    target: str,
    dtype: str | None,
    base: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write RUN, a run, adapter or model, for another program; adapters are merged."""
    target_folder = chosen_output(output_word, output)
    import torch

    from tt_train.models.export import export

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    done = export(
        run,
        target_folder,
        to=target,
        dtype=dtypes[dtype] if dtype else None,
        base=base or None,
        dry_run=dry_run,
        tell=tell,
    )
    if as_json:
        print_json(done)
        return
    for line in done["commands"]:
        click.echo(f"  {line}", err=True)
    answer(done["path"])
