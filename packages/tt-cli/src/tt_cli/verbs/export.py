"""``tt export``: a model in the form that another program reads, and the commands to run it there."""

from dataclasses import asdict
from pathlib import Path

import click

from tt_ckpt.shown import format_size
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
from tt_train.errors import counted


@click.command(
    "export",
    cls=Verb,
    examples=[
        "tt export runs/first -o for-vllm",
        "tt export runs/first -o first.gguf --to gguf --type q8_0",
        "tt export runs/first -o for-ollama --to ollama --type q4_0",
        "tt export runs/first -o adapter.gguf --to gguf --adapter",
    ],
)
@click.argument("run", type=click.Path(), shell_complete=complete_runs)
@output_option("Directory to write; for --to gguf, the file.")
@click.option(
    "--to",
    "target",
    metavar="hf|gguf|ollama",
    default="hf",
    show_default=True,
    help="Format to write: hf for vLLM, SGLang and transformers, gguf for llama.cpp, ollama adds a Modelfile.",
)
@click.option(
    "--type",
    "kind",
    metavar="f32|f16|bf16|q8_0|q4_0",
    show_default="as in the base",
    help="Type of the matrices in a GGUF file. With --to ollama, write a GGUF file instead of a directory of weights.",
)
@click.option("--adapter", is_flag=True, help="Write only the adapter, for a server that has the base.")
@dtype_option("that of each tensor in the base")
@base_option
@dry_run_option
@json_option
def command(
    run: str,
    output_word: Path | None,
    output: Path | None,
    target: str,
    kind: str | None,
    adapter: bool,
    dtype: str | None,
    base: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write RUN, a run, adapter or model, for another program, and print the commands to run it there.

    Adapters are merged unless --adapter is given. OUTPUT or -o names the directory, or the file of --to gguf.
    """
    target_folder = chosen_output(output_word, output)
    from tt_cli.console import byte_progress
    from tt_train.models.export import export

    with byte_progress(f"{run} to {target}") as progress:
        done = export(
            run,
            target_folder,
            to=target,
            type=kind,
            adapter=adapter,
            dtype=torch_dtype(dtype),
            base=base or None,
            dry_run=dry_run,
            tell=tell,
            progress=progress,
        )
    written = done["gguf"]
    if as_json:
        print_json({**done, "gguf": written and asdict(written)})
        return
    if written is not None:
        size = f"{format_size(written.num_bytes)}, {written.type}, relative error {written.error:.2g}"
        tell(f"wrote and read back {counted(written.num_tensors, 'tensor')} ({size})")
    if dry_run:
        tell(f"would write {target} to {done['path']}")
    for line in done["commands"]:
        tell(f"  {line}")
    answer(done["path"])
