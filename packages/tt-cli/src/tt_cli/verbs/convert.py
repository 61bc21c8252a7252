"""``tt convert``: a model from one format of directory to another."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tt_ckpt.shown import format_size
from tt_cli.group import Verb
from tt_cli.options import Number, dry_run_option, dtype_option, json_option, torch_dtype
from tt_cli.terminal import answer, print_json, tell
from tt_train.errors import counted

if TYPE_CHECKING:
    from tt_ckpt import AdapterConversion


@click.command(
    "convert",
    cls=Verb,
    examples=[
        "tt convert meta-llama/Llama-3.2-1B llama-torchtune --to torchtune",
        "tt convert llama-meta llama-hf --allow-pickle --dtype bf16",
        "tt convert merged merged-meta --to meta --dry-run",
        "tt convert tuned adapter --to peft --config merged --alpha 16 --allow-pickle",
    ],
)
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    default="hf",
    show_default=True,
    type=click.Choice(["hf", "meta", "torchtune", "peft"]),
    help="Format to write; peft is for an adapter of torchtune.",
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Also read .pth, .pt and .bin files. They can contain code, which is never run.",
)
@click.option(
    "--config",
    metavar="DIR",
    help="Directory with the config.json, params.json or tokenizer that SOURCE lacks.",
)
@dtype_option("as in SOURCE; fp32 for a quantized GGUF file")
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Maximum size of each hf file."
)
@click.option(
    "--num-parts",
    type=Number(click.IntRange(1, 1024)),
    metavar="N",
    default=1,
    show_default=True,
    help="Number of model-parallel files for --to meta.",
)
@click.option(
    "--alpha",
    type=Number(click.FloatRange(-(10**6), 10**6)),
    metavar="A",
    help="For --to peft: lora_alpha of the adapter, if torchtune did not write an adapter_config.json.",
)
@click.option("--overwrite", is_flag=True, help="Replace the files in DESTINATION once the new ones are complete.")
@dry_run_option
@json_option
def command(
    source: str,
    destination: Path,
    target: str,
    allow_pickle: bool,
    config: str | None,
    dtype: str | None,
    max_shard_size: str,
    num_parts: int,
    alpha: float | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the model SOURCE to the directory DESTINATION in another format, read it back and compare.

    SOURCE is a model directory, a hub id or a GGUF file. With --to peft it is the output directory of torchtune or an
    adapter file in it, and --config names the base model.
    """
    import tt_ckpt

    if target == "peft":
        if dtype is not None:
            raise click.UsageError("--dtype is not for --to peft, which keeps the dtype", click.get_current_context())
        adapter = tt_ckpt.convert_adapter(
            source, destination, config=config, alpha=alpha, allow_pickle=allow_pickle, overwrite=overwrite,
            dry_run=dry_run,
        )  # fmt: skip
        _tell_adapter(adapter, as_json=as_json, dry_run=dry_run)
        return
    if alpha is not None:
        raise click.UsageError("--alpha goes with --to peft", click.get_current_context())
    from tt_cli.console import byte_progress

    with byte_progress(f"{source} to {target}") as progress:
        done = tt_ckpt.convert(
            source,
            destination,
            target,  # type: ignore[arg-type]
            allow_pickle=allow_pickle,
            config=config,
            dtype=torch_dtype(dtype),
            max_shard_size=max_shard_size,
            num_parts=num_parts,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    verb = "would write" if dry_run else "wrote and read back"
    size = f"{format_size(done.num_bytes)}, {', '.join(done.dtypes)}"
    tell(f"{verb} {counted(done.num_tensors, 'tensor')} ({size}) from {done.source_format}{_of(done.epochs)}")
    answer(done.destination)


def _of(epochs: Sequence[int]) -> str:
    """Which of several epochs of torchtune was taken."""
    return f", the newest of the epochs {', '.join(map(str, epochs))}" if len(epochs) > 1 else ""


def _tell_adapter(adapter: "AdapterConversion", *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        print_json({**asdict(adapter), "dry_run": dry_run})
        return
    tell(f"from {adapter.source}{_of(adapter.epochs)}")
    verb = "would write" if dry_run else "wrote and read back"
    facts = f"rank {adapter.rank}, alpha {adapter.alpha:g}, {', '.join(adapter.target_modules)}"
    tell(f"{verb} {counted(adapter.num_tensors, 'tensor')}: {facts}; the base is {adapter.base}")
    answer(adapter.destination)
