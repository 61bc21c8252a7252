"""``--base``: where the base of an adapter is, and in which form it computes."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from tt_cli.terminal import say

Function = TypeVar("Function", bound=Callable[..., Any])


def base_option(function: Function) -> Function:
    """The option, given to the verb as ``base``."""
    return click.option(
        "--base",
        multiple=True,
        metavar="DIR|nf4|dense",
        help="Where the base of an adapter is, if it has moved; nf4 or dense: in 4 bits, or as its files have it "
        "(default: as in training). Both may be given.",
    )(function)


def tell(text: str) -> None:
    """A line on stderr about what was loaded or written."""
    say(text, err=True)
