"""``tt download``: a repository of the hub, checked by hash."""

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from tt_ckpt.shown import format_size, listed
from tt_cli.group import Verb
from tt_cli.options import dry_run_option, json_option
from tt_cli.terminal import answer, print_json, tell
from tt_train.errors import counted


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
    "--output-dir",
    "output",
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
@click.option(
    "--ignore-patterns", multiple=True, metavar="PATTERN", hidden=True, help="The same, as torchtune spells it."
)
@dry_run_option
@json_option
def command(
    repo: str,
    revision: str | None,
    output: Path | None,
    allow: tuple[str, ...],
    ignore: tuple[str, ...],
    ignore_patterns: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Download the hub repository REPO and print its directory. The same command resumes an interrupted download.

    The token is read from HF_TOKEN or from `hf auth login`. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work as usual.
    """
    from tt_ckpt.hub import download as hub

    wanted, unwanted = allow or hub.WANTED, (*ignore, *_for_us(ignore_patterns)) or hub.UNWANTED
    done = hub.download(repo, revision=revision, output_dir=output, allow=wanted, ignore=unwanted, dry_run=dry_run)
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    size = f"{counted(len(done.files), 'file')}, {format_size(done.num_bytes)}"
    tell(f"would download {size}: {listed(done.files)}" if dry_run else f"{size}, {done.num_verified} checked by hash")
    answer(done.path)


def _for_us(patterns: Sequence[str]) -> list[str]:
    """torchtune's --ignore-patterns, without those that leave out the weights that tt reads.

    torchtune wanted one set of weights and read pickles, so its commands ignore safetensors. Here it is the other way.
    """
    kept = []
    for pattern in patterns:
        if fnmatch.fnmatch("model.safetensors", pattern):
            tell(f"--ignore-patterns {pattern}: not followed, since tt reads safetensors and leaves out pickles")
        else:
            kept.append(pattern)
    return kept
