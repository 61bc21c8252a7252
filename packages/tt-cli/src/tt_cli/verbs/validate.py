"""``tt validate``: every mistake that can be known before weights load."""

import click

from tt_cli.group import ConfigVerb
from tt_cli.names import composed
from tt_cli.options import config_words, json_option
from tt_cli.terminal import print_json, tell, tell_rows


@click.command(
    "validate",
    cls=ConfigVerb,
    examples=[
        "tt validate sft model.path=Qwen/Qwen3-0.6B data.train=rows.jsonl",
        "tt validate my.yaml adapter.rank=16 --json",
    ],
)
@config_words()
@click.option("--all-rows", is_flag=True, help="Check every row, also of sources with more than 10,000 rows.")
@json_option
def command(
    what: str, overrides: tuple[str, ...], config_file: str | None, allow_import: tuple[str, ...], all_rows: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Check everything about a config that needs no weights: keys, paths, columns, shapes, devices and loggers.

    Of a source with more than 10,000 rows it checks a sample, and says which rows. tt run checks all rows.
    """
    config = composed(what, config_file, overrides, allow_import)
    from tt_train.job import assemble

    job = assemble(config, sample=not all_rows)
    if as_json:
        held_out = job.held_out.report if job.held_out else None
        print_json({"config": what, "data": job.data_report, "held_out": held_out, "notes": job.notes})
        return
    for line in job.notes:
        tell(line)
    tell_rows(job.data_lines)
    reports = [job.data_report, *([job.held_out.report] if job.held_out else [])]
    if any("sampled_from" in report for report in reports):
        tell("only a sample of the rows was checked; --all-rows checks them all, as tt run does before it trains")
        click.echo(f"{what}: no mistakes found in the config and the sample of the rows")
        return
    click.echo(f"{what}: no mistakes found")
