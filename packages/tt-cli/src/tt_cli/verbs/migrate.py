"""``tt migrate``: a YAML file of torchtune as one of ours."""

import tempfile
from pathlib import Path

import click

from tt_cli.group import Verb
from tt_cli.options import AT_LEAST_ONE, json_option
from tt_cli.terminal import answer, print_json


@click.command(
    "migrate",
    cls=Verb,
    examples=[
        "tt migrate torchtune.yaml",
        "tt migrate torchtune.yaml -o mine.yaml --devices 8",
        "tt migrate torchtune.yaml --json",
    ],
)
@click.argument("file", metavar="FILE.yaml", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT.yaml", type=click.Path(path_type=Path), help="New file to write.")
@click.option(
    "--devices",
    type=AT_LEAST_ONE,
    metavar="N",
    default=1,
    show_default=True,
    help="Number of GPUs that torchtune ran on: its batch size is that of one.",
)
@json_option
def command(file: Path, output: Path | None, devices: int, as_json: bool) -> None:
    """Print the YAML of `tt` that means what FILE.yaml means in torchtune 0.1 to 0.6.

    Each key that differs or could not be carried over is a line on stderr. sft, LoRA, QLoRA, DoRA and DPO can be
    migrated, single or distributed. Nothing that the file names is loaded.
    """
    from tt_train.settings.torchtune.migrate import migrate_file

    found = migrate_file(file, devices=devices)
    text = found.yaml()
    problems = [*found.problems, *_mistakes(text)]
    if output is not None:
        try:
            with output.open("x", encoding="utf-8") as new:
                new.write(text)
        except FileExistsError:
            raise ValueError(f"{output} exists; name another file") from None
    if as_json:
        print_json({"config": found.config, "problems": problems})
        return
    for line in problems:
        click.echo(line, err=True)
    answer(output if output is not None else text.rstrip("\n"))


def _mistakes(text: str) -> list[str]:
    """What ``tt validate`` would say of the keys and values; paths are not read."""
    from tt_train import ConfigError, compose

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "migrated.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            compose(file)
        except ConfigError as error:
            return [problem.replace(f"{folder}/", "") for problem in error.problems]
    return []
