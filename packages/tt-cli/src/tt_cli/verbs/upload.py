"""``tt upload``: a model or adapter directory to the hub."""

from dataclasses import asdict
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.names import complete_runs
from tt_cli.options import dry_run_option, json_option
from tt_cli.terminal import print_json, tell
from tt_train.errors import counted


@click.command(
    "upload",
    cls=Verb,
    examples=[
        "tt upload runs/first my-name/my-model --dry-run",
        "tt upload merged my-name/my-model --public",
    ],
)
@click.argument("path", type=click.Path(path_type=Path), shell_complete=complete_runs)
@click.argument("repo")
@click.option("--public", is_flag=True, help="Make a new repository public. [default: private]")
@click.option("--revision", metavar="NAME", show_default="main", help="Branch to commit to.")
@click.option("--message", metavar="TEXT", default="Upload with tt", show_default=True, help="Commit message.")
@dry_run_option
@json_option
def command(
    path: Path, repo: str, public: bool, revision: str | None, message: str, dry_run: bool, as_json: bool
) -> None:
    """Upload the model or adapter at PATH to the hub repository REPO, with a model card, and compare hashes.

    PATH may be a run directory: its adapter or model is sent. Only the files of a model are sent; the others are
    listed. A link, or a file with a secret in it, is refused. The token is read from HF_TOKEN or from `hf auth login`.
    """
    from tt_ckpt.hub.upload import upload
    from tt_train.run.dir import results_of

    done = upload(results_of(path), repo, private=not public, revision=revision, message=message, dry_run=dry_run)
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    verb = "would send" if dry_run else "sent"
    tell(f"{verb} {', '.join(done.files)} ({done.num_bytes / 1e6:.1f} MB)")
    if done.left_out:
        tell(f"left out {counted(len(done.left_out), 'file')} that a model does not need: {_by_ending(done.left_out)}")
    click.echo(done.url or repo)


def _by_ending(names: list[str], count: int = 20) -> str:
    """``.json: a, b; .pt: c; d/``: a list of what is not sent must not read like one of what is."""
    groups: dict[str, list[str]] = {}
    for name in names[:count]:
        ending = "" if name.endswith("/") else Path(name).suffix
        groups.setdefault(ending, []).append(name.removesuffix(ending))
    shown = "; ".join(f"{ending}: {', '.join(held)}" if ending else ", ".join(held) for ending, held in groups.items())
    return shown + (f"; and {len(names) - count} more" if len(names) > count else "")
