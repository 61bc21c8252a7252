"""``tt data show``: rows as the model sees them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from tt_cli.group import ConfigVerb
from tt_cli.names import composed, refuse_run, runnable_names
from tt_cli.options import COUNT, Number, config_words, json_option
from tt_cli.terminal import print_json, say, tell_rows, wants_color
from tt_train.errors import counted, shell_word

if TYPE_CHECKING:
    import tt_data

Rows: TypeAlias = "tt_data.Dataset | tt_data.Stream"


@click.command(
    "show",
    cls=ConfigVerb,
    examples=[
        "tt data show rows.jsonl --tokenizer Qwen/Qwen3-0.6B -n 1",
        "tt data show rows.jsonl --tokenizer Qwen/Qwen3-0.6B --stats",
        "tt data show my.yaml data.max_seq_len=512",
    ],
)
@config_words("DATA|RECIPE|CONFIG|FILE.py")
@click.option(
    "--tokenizer", metavar="MODEL", type=click.Path(), help="Model whose tokenizer to use: a directory, hub id or file."
)
@click.option("-n", "--num", type=COUNT, metavar="N", default=3, show_default=True, help="Number of rows.")
@click.option(
    "--start", type=COUNT, metavar="N", default=0, show_default=True, help="First row to show, counted from 0."
)
@click.option(
    "--stats",
    is_flag=True,
    help="Show lengths, the share of trained tokens and the rows that were dropped, instead of rows.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="OURS=THEIRS",
    help="Say which column of the rows is which, as in messages=conv. Can be repeated.",
)
@click.option(
    "--train-on", type=click.Choice(["assistant", "last", "all"]), show_default="assistant", help="Turns to train on."
)
@click.option(
    "--max-seq-len",
    type=Number(click.IntRange(2, 2**24)),
    metavar="N",
    help="Maximum number of tokens of a row; longer rows are cut.",
)
@click.option("--packing", is_flag=True, help="Pack several rows into each sequence of --max-seq-len tokens.")
@click.option(
    "--template",
    metavar="NAME",
    show_default="the model's own",
    help="Template to use: a built-in name or a .jinja file.",
)
@click.option(
    "--schema",
    metavar="NAME",
    show_default="detected",
    help="Format of the rows if their columns fit several, such as openai or alpaca.",
)
@click.option(
    "--special-tokens",
    type=click.Choice(["text", "tokens"]),
    show_default="text",
    help="What special tokens typed in rows become.",
)
@click.option("--split", metavar="NAME", help="Split of a hub data set or folder.")
@click.option("--streaming", is_flag=True, help="Read the rows as a stream, no further than the rows shown.")
@json_option
def command(
    what: str,
    overrides: tuple[str, ...],
    config_file: str | None,
    allow_import: tuple[str, ...],
    num: int,
    start: int,
    stats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show rows of DATA (a file, folder or hub id) as the model named by --tokenizer sees them.

    For a recipe, a config or a recipe file, show the rows of data.train as its run would see them; options override the
    config. Trained text is green, or between marks if there is no colour. Only the shown rows are read and summarized;
    --stats reads all rows.
    """
    import tt_data

    limit = None if stats else max(1, start + num)
    if what in runnable_names() or what.endswith((".yaml", ".yml", ".py")):
        dataset = _rows_of_config(what, config_file, (*overrides, *_as_words(options)), allow_import, limit=limit)
    else:
        if overrides or config_file:
            given = overrides[0] if overrides else "--config"
            if "=" not in given and overrides:
                raise click.UsageError(f"a second source, '{given}'; did you mean --tokenizer {shell_word(given)}?")
            raise click.UsageError(
                f"{given} needs a recipe: tt data show sft {shell_word(f'data.train={what}')} KEY=VALUE"
            )
        refuse_run(what)
        whole = options["packing"] or options["streaming"]
        dataset = _rows_of_data(what, limit=None if whole else limit, **options)
    if isinstance(dataset, tt_data.Stream):
        if stats or dataset.is_packed:
            raise click.UsageError("--stats and --packing need all rows, but --streaming reads only the first ones")
        dataset = dataset.head(max(1, start + num))
    if stats:
        figures = tt_data.stats(dataset)
        if as_json:
            print_json(figures)
        else:
            lines = tt_data.summary_lines(dataset.report, problems=0)  # the figures name them all
            click.echo("\n".join([*lines, tt_data.stats_as_text(figures)]))
        return
    if start >= len(dataset) and num:
        raise ValueError(f"--start {start}: the data set has {counted(len(dataset), 'row')}, counted from 0")
    shown = tt_data.show(dataset, rows=range(start, min(start + num, len(dataset))))
    if as_json:
        print_json(dataset.report, said={"shown": [_with_names(sample) for sample in shown]})
        return
    tell_rows(tt_data.summary_lines(dataset.report))
    for sample in shown:
        say(tt_data.as_text(sample, color=wants_color(sys.stdout)).rstrip("\n") + "\n", styled=True)


def _rows_of_data(data: str, *, tokenizer: str | None, columns: tuple[str, ...], **settings: Any) -> "Rows":
    if tokenizer is None:
        raise click.UsageError("no tokenizer: name the model that will see the rows, as in --tokenizer MODEL")
    import tt_ckpt
    import tt_data

    path = tokenizer if Path(tokenizer).exists() else tt_ckpt.resolve(tokenizer)
    names = {ours: theirs for ours, _, theirs in (word.partition("=") for word in _checked(columns))}
    settings["train_on"] = settings["train_on"] or "assistant"
    settings["special_tokens"] = settings["special_tokens"] or "text"
    rows: Rows = tt_data.load_dataset(data, tt_data.load_tokenizer(path), columns=names or None, **settings)
    return rows


def _rows_of_config(
    what: str, config_file: str | None, words: tuple[str, ...], allow_import: tuple[str, ...], *, limit: int | None
) -> "Rows":
    """The rows of ``data.train``."""
    config = composed(what, config_file, words, allow_import, complete=False)
    from tt_train.job import rows_to_train

    return rows_to_train(config, limit=limit)


def _as_words(options: Mapping[str, Any]) -> list[str]:
    """The options that were given, as the words of a config that say the same."""
    keys = {"tokenizer": "model.tokenizer", "train_on": "data.train_on", "max_seq_len": "data.max_seq_len",
            "packing": "data.packing", "template": "data.template", "schema": "data.schema", "split": "data.split",
            "streaming": "data.streaming", "special_tokens": "data.special_tokens"}  # fmt: skip
    words = [f"{key}={options[name]}" for name, key in keys.items() if options[name] not in (None, False)]
    return [*words, *(f"data.columns.{word}" for word in _checked(options["columns"]))]


def _checked(columns: tuple[str, ...]) -> tuple[str, ...]:
    for word in columns:
        if not all(word.partition("=")):
            raise ValueError(f"--column {word}: expected OURS=THEIRS, such as messages=conversation")
    return columns


def _with_names(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The documents of a sample as objects, for JSON."""
    documents = [
        {"name": name, "pieces": [{"text": text, "trained": trained} for text, trained in pieces]}
        for name, pieces in zip(sample["names"], sample["documents"], strict=True)
    ]
    return {key: value for key, value in sample.items() if key != "names"} | {"documents": documents}
