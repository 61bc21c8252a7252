"""``tt download``: a repository of the hub, checked by hash."""

from dataclasses import asdict
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.options import json_option
from tt_cli.terminal import answer, print_json, tell


@click.command(
    "download",
    cls=Verb,
    examples=[
        "tt download Qwen/Qwen3-0.6B",
        "tt download Qwen/Qwen3-0.6B -o qwen --revision main",
        'tt download Qwen/Qwen3-0.6B --allow "*.json"',
    ],
)
@click.argument("repo")
@click.option("--revision", metavar="NAME", show_default="main", help="Branch, tag or commit to download.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    show_default="the hub's cache",
    help="Directory to download to.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="PATTERN",
    show_default="model, tokenizer and config files",
    help="Download only files that match. Can be repeated.",
)
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave out files that match. Can be repeated.")
@json_option
def command(
    repo: str, revision: str | None, output: Path | None, allow: tuple[str, ...], ignore: tuple[str, ...], as_json: bool
) -> None:
    """Download the hub repository REPO and print its directory. The same command resumes an interrupted download.

    The token is read from HF_TOKEN or from `hf auth login`. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work as usual.
    """
    from tt_ckpt.hub import download as hub

    wanted, unwanted = allow or hub.WANTED, ignore or hub.UNWANTED
    done = hub.download(repo, revision=revision, output_dir=output, allow=wanted, ignore=unwanted)
    if as_json:
        print_json(asdict(done))
        return
    tell(f"{len(done.files)} files, {done.num_bytes / 1e9:.2f} GB, {done.num_verified} checked by hash")
    answer(done.path)
