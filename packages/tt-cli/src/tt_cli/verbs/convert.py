"""``tt convert``: a model from one format of directory to another."""

from dataclasses import asdict
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.options import dtype_option, json_option, torch_dtype
from tt_cli.terminal import answer, print_json


@click.command("convert", cls=Verb)
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    default="hf",
    show_default=True,
    type=click.Choice(["hf", "meta", "torchtune"]),
    help="The format to write.",
)
@click.option("--allow-pickle", is_flag=True, help="Read .pth, .pt and .bin files, which can hold code, restrictedly.")
@click.option("--config", help="A directory with the config.json or params.json that SOURCE lacks, or a tokenizer.")
@dtype_option("as in SOURCE; fp32 for a GGUF file with quantized tensors")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of hf files.")
@click.option(
    "--num-parts", type=click.IntRange(1, 1024), default=1, show_default=True, help="Model-parallel parts of meta."
)
@click.option("--overwrite", is_flag=True, help="Replace what DESTINATION holds, once the new files are whole.")
@click.option("--dry-run", is_flag=True, help="Read and check SOURCE, and say what would be written.")
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
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the model of SOURCE, a directory, hub id or GGUF file, to DESTINATION in another format.

    What was written is read back and compared.
    """

    import tt_ckpt
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
        print_json(asdict(done))
        return
    verb = "would write" if dry_run else "wrote and read back"
    size = f"{done.num_bytes / 1e9:.2f} GB, {', '.join(done.dtypes)}"
    click.echo(f"{verb} {done.num_tensors} tensors ({size}) from {done.source_format}", err=True)
    answer(done.destination)
