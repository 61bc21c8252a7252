"""Where a verb writes: ``tt merge RUN DIR`` and ``tt merge RUN -o DIR`` say the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_output(help: str) -> Callable[[Function], Function]:
    """A decorator for the argument ``OUTPUT`` and the option ``-o``, of which exactly one must be given."""

    def decorate(function: Function) -> Function:
        option = click.option("-o", "--output", type=click.Path(path_type=Path), help=help)
        word = click.argument("output_word", metavar="[OUTPUT]", required=False, type=click.Path(path_type=Path))
        return word(option(function))

    return decorate


def chosen_output(word: Path | None, option: Path | None) -> Path:
    """The one that was given."""
    if word is not None and option is not None:
        raise click.UsageError(
            f"two outputs, '{word}' and -o {option}: give one of the two", click.get_current_context()
        )
    found = word or option
    if found is None:
        raise click.UsageError("no output: name the directory to write, as in -o DIR", click.get_current_context())
    return found
