"""``tt data show``: rows as the model sees them."""

import sys
from pathlib import Path
from typing import Any

import click

from tt_cli.group import Verb, json_option, print_json, wants_color


@click.command("show", cls=Verb)
@click.argument("data", type=click.Path())
@click.option("--tokenizer", required=True, metavar="MODEL", type=click.Path(), help="A directory, hub id or file.")
@click.option("-n", "--num", type=click.IntRange(min=0), default=3, show_default=True, help="How many rows.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="The first row shown.")
@click.option("--stats", is_flag=True, help="Lengths, the share trained and what was dropped, instead of rows.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Name a column, such as messages=conv.")
@click.option("--train-on", type=click.Choice(["assistant", "last", "all"]), default="assistant", show_default=True)
@click.option("--max-seq-len", type=click.IntRange(min=2), help="Cut rows there.")
@click.option("--packing", is_flag=True, help="Rows packed up to --max-seq-len.")
@click.option("--template", metavar="NAME", help="A registered template; default: the model's own.")
@click.option("--split", metavar="NAME", help="Of a hub data set or folder.")
@click.option("--streaming", is_flag=True, help="Read no further than the rows shown.")
@json_option
def command(
    data: str,
    tokenizer: str,
    num: int,
    start: int,
    stats: bool,
    columns: tuple[str, ...],
    streaming: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show rows of DATA (a file, folder or hub id) as the model named by --tokenizer sees them.

    What is trained is green, or stands between marks where there is no colour.
    """
    if streaming and (stats or settings["packing"]):
        raise click.UsageError("--streaming shows the first rows; --stats and --packing need all of them")
    import tt_ckpt
    import tt_data

    path = tokenizer if Path(tokenizer).exists() else tt_ckpt.resolve(tokenizer)
    settings |= {"columns": _columns(columns) or None, "streaming": streaming}
    dataset = tt_data.load_dataset(data, tt_data.load_tokenizer(path), **settings)
    if streaming:
        dataset = dataset.head(max(1, start + num))
    if stats:
        figures = tt_data.stats(dataset)
        if as_json:
            print_json(figures)
        else:
            lines = tt_data.summary_lines(dataset.report, problems=0)  # the figures name them all
            click.echo("\n".join([*lines, tt_data.stats_as_text(figures)]))
        return
    shown = tt_data.show(dataset, rows=range(start, min(start + num, len(dataset))))
    if as_json:
        print_json({**dataset.report, "shown": [_with_names(sample) for sample in shown]})
        return
    click.echo("\n".join(tt_data.summary_lines(dataset.report)), err=True)
    for sample in shown:
        click.echo(tt_data.as_text(sample, color=wants_color(sys.stdout)).rstrip("\n") + "\n")


def _columns(words: tuple[str, ...]) -> dict[str, str]:
    for word in words:
        if not all(word.partition("=")):
            raise ValueError(f"--column {word}: expected OURS=THEIRS, such as messages=conversation")
    return {ours: theirs for ours, _, theirs in (word.partition("=") for word in words)}


def _with_names(sample: dict[str, Any]) -> dict[str, Any]:
    """The documents of a sample as objects, for JSON."""
    documents = [
        {"name": name, "pieces": [{"text": text, "trained": trained} for text, trained in pieces]}
        for name, pieces in zip(sample["names"], sample["documents"], strict=True)
    ]
    return {key: value for key, value in sample.items() if key != "names"} | {"documents": documents}
