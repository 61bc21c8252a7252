"""``tt download``: a repository of the hub, checked by hash."""

from dataclasses import asdict
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.options import json_option
from tt_cli.terminal import answer, print_json


@click.command("download", cls=Verb)
@click.argument("repo")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A directory; default: the hub's cache.")
@click.option(
    "--allow", multiple=True, metavar="PATTERN", help="Fetch these files only; safetensors, json ... by default."
)
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave these files out.")
@json_option
def command(
    repo: str, revision: str | None, output: Path | None, allow: tuple[str, ...], ignore: tuple[str, ...], as_json: bool
) -> None:
    """Fetch REPO and print where it is; the same command resumes what was interrupted.

    The token is read from HF_TOKEN or from `hf auth login`; HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured.
    """
    from tt_ckpt.hub import download as hub

    wanted, unwanted = allow or hub.WANTED, ignore or hub.UNWANTED
    done = hub.download(repo, revision=revision, output_dir=output, allow=wanted, ignore=unwanted)
    if as_json:
        print_json(asdict(done))
        return
    click.echo(f"{len(done.files)} files, {done.num_bytes / 1e9:.2f} GB, {done.num_verified} checked by hash", err=True)
    answer(done.path)
