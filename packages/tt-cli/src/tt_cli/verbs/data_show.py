"""``tt data show``: rows as the model sees them."""

import sys
from pathlib import Path
from typing import Any

import click

from tt_cli.group import Verb, json_option, print_json, wants_color
from tt_cli.marking import mark

IGNORE = -100


@click.command("show", cls=Verb)
@click.argument("data", type=click.Path())
@click.option("--tokenizer", required=True, metavar="MODEL", type=click.Path(), help="A directory, hub id or file.")
@click.option("-n", "--num", type=click.IntRange(min=0), default=3, show_default=True, help="How many rows.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="The first row shown.")
@click.option("--stats", is_flag=True, help="Lengths over all rows, instead of rows.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Name a column, such as messages=conv.")
@click.option("--train-on", type=click.Choice(["assistant", "last", "all"]), default="assistant", show_default=True)
@click.option("--max-seq-len", type=click.IntRange(min=2), help="Cut rows there.")
@click.option("--packing", is_flag=True, help="Rows packed up to --max-seq-len.")
@click.option("--template", metavar="NAME", help="A registered template; default: the model's own.")
@click.option("--split", metavar="NAME", help="Of a hub data set or folder.")
@json_option
def command(
    data: str,
    tokenizer: str,
    num: int,
    start: int,
    stats: bool,
    columns: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Show rows of DATA (a file, folder or hub id) as the model named by --tokenizer sees them.

    What is trained is green, or stands between marks where there is no colour.
    """
    import tt_ckpt
    import tt_data

    path = tokenizer if Path(tokenizer).exists() else tt_ckpt.resolve(tokenizer)
    dataset = tt_data.load_dataset(data, tt_data.load_tokenizer(path), columns=_columns(columns) or None, **settings)
    if stats:
        _print_stats(dataset, as_json)
    else:
        _print_rows(dataset, range(start, min(start + num, len(dataset))), as_json)


def _columns(words: tuple[str, ...]) -> dict[str, str]:
    for word in words:
        if not all(word.partition("=")):
            raise ValueError(f"--column {word}: expected OURS=THEIRS, such as messages=conversation")
    return {ours: theirs for ours, _, theirs in (word.partition("=") for word in words)}


def _print_rows(dataset: Any, indices: range, as_json: bool) -> None:
    if as_json:
        print_json({**dataset.report, "shown": [_row(dataset, index) for index in indices]})
        return
    click.echo(summary(dataset.report), err=True)
    for index in indices:
        row = dataset[index]
        click.secho(f"row {index}: {num_tokens(row)} tokens, {trained_tokens(row)} trained", bold=True)
        click.echo(mark(dataset.rendered(index), color=wants_color(sys.stdout)) + "\n")


def _row(dataset: Any, index: int) -> dict[str, Any]:
    row = dataset[index]
    pieces = [{"text": text, "trained": trained} for text, trained in dataset.rendered(index)]
    return {"index": index, "tokens": num_tokens(row), "trained": trained_tokens(row), "pieces": pieces}


def _print_stats(dataset: Any, as_json: bool) -> None:
    lengths = sorted(num_tokens(dataset[index]) for index in range(len(dataset)))
    trained = sum(trained_tokens(dataset[index]) for index in range(len(dataset)))
    figures = {
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "p95": lengths[len(lengths) * 95 // 100],
        "longest": lengths[-1],
    }
    if as_json:
        print_json({**dataset.report, "stats": figures})
        return
    click.echo(summary(dataset.report))
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):<15}{value:>12,}")


def num_tokens(row: dict[str, Any]) -> int:
    """Tokens of ``row``; of both answers where it holds a chosen and a rejected one."""
    return sum(len(value) for key, value in row.items() if key.endswith("labels"))


def trained_tokens(row: dict[str, Any]) -> int:
    """How many labels of ``row`` take a loss."""
    return sum(int(label) != IGNORE for key, value in row.items() if key.endswith("labels") for label in value)


def summary(report: dict[str, Any]) -> str:
    """One line about all rows: how many, read as what, and what was left out."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
    return (
        f"{report['rows']:,} {report['schema']} rows; dropped: {dropped or 'none'}; truncated: {report['truncated']:,}"
    )
