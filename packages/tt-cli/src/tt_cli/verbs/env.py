"""``tt env``: versions and devices."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from tt_cli.group import Verb
from tt_cli.options import json_option
from tt_cli.terminal import print_json


@click.command(
    "env",
    cls=Verb,
    examples=[
        "tt env",
        "tt env --json",
    ],
)
@json_option
def command(as_json: bool) -> None:
    """Show versions and devices, for a bug report."""
    from tt_train.run.environment import collect

    facts = collect()
    if as_json:
        print_json(facts)
        return
    rows = list(_flat(facts))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name.ljust(width)}  {value}")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value)) or "none"
        else:
            yield prefix + name, "none" if value is None else str(value)
