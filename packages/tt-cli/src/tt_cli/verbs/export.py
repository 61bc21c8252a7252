"""``tt export``: a model in the form that another program reads, and the commands to run it there."""

from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import base_option, chosen_output, dtype_option, json_option, output_option, torch_dtype
from tt_cli.terminal import answer, print_json, tell


@click.command(
    "export",
    cls=Verb,
    examples=[
        "tt export runs/first -o for-vllm",
        "tt export runs/first -o for-ollama --to ollama",
    ],
)
@click.argument("run", type=click.Path(), shell_complete=complete_runs)
@output_option("Directory to write.")
@click.option(
    "--to",
    "target",
    metavar="hf|ollama",
    default="hf",
    show_default=True,
    help="Program to write for: hf is what vLLM, llama.cpp and transformers read.",
)
@dtype_option("that of each tensor in the base")
@base_option
@click.option("--dry-run", is_flag=True, help="Check that it can be done, and write nothing.")
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
    """Write RUN, a run, adapter or model, for another program, and print the commands to run it there.

    Adapters are merged. The directory is OUTPUT or -o DIR.
    """
    target_folder = chosen_output(output_word, output)
    from tt_train.models.export import export

    done = export(
        run,
        target_folder,
        to=target,
        dtype=torch_dtype(dtype),
        base=base or None,
        dry_run=dry_run,
        tell=tell,
    )
    if as_json:
        print_json(done)
        return
    for line in done["commands"]:
        tell(f"  {line}")
    answer(done["path"])
