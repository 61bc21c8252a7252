"""The options that several verbs share, each with one wording, and the numbers that options take."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tt_cli.names import complete_keys, complete_runnable

if TYPE_CHECKING:
    import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# a number outside its bounds is refused before anything is loaded
COUNT = click.IntRange(0, 10**9)
AT_LEAST_ONE = click.IntRange(1, 10**9)
TOKENS = click.IntRange(1, 2**24)
SEED = click.IntRange(0, 2**64 - 1)  # torch's


class FiniteRange(click.FloatRange):
    """A range without nan, which compares as neither below nor above a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number; write a decimal number such as 0.7", param, ctx)
        return number


def _all_of(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """One decorator for several; the help lists them in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def config_words(metavar: str = "RECIPE|CONFIG|FILE.py") -> Callable[[Function], Function]:
    """What a verb about a config takes: ``what``, ``overrides``, ``config_file`` and ``allow_import``."""
    return _all_of(
        click.argument("what", metavar=metavar, shell_complete=complete_runnable),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys),
        click.option(
            "--config", "config_file", metavar="CONFIG", type=click.Path(), help="A YAML file or registered config."
        ),
        click.option("--allow-import", multiple=True, metavar="PKG.MOD", help="Accept components from this module."),
    )


def json_option(function: Function) -> Function:
    """``--json``, given to the verb as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Answer as one JSON object.")(function)


def base_option(function: Function) -> Function:
    """``--base``: where the base of an adapter is, and in which form it computes."""
    return click.option(
        "--base",
        multiple=True,
        metavar="DIR|nf4|dense",
        help="Where the base of an adapter is, if it has moved; nf4 or dense: in 4 bits, or as its files have it "
        "(default: as in training). Both may be given.",
    )(function)


def dtype_option(default: str) -> Callable[[Function], Function]:
    """``--dtype``; ``default`` says what is written without it."""
    return click.option(
        "--dtype",
        type=click.Choice(["fp32", "bf16", "fp16"]),
        help=f"Data type of the weights written; default: {default}.",
    )


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The value of ``--dtype`` as torch has it."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[name]


def output_option(help: str) -> Callable[[Function], Function]:
    """The argument ``OUTPUT`` and the option ``-o``, of which exactly one must be given: see ``chosen_output``."""
    return _all_of(
        click.argument("output_word", metavar="[OUTPUT]", required=False, type=click.Path(path_type=Path)),
        click.option("-o", "--output", type=click.Path(path_type=Path), help=help),
    )


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


def sampling_options(function: Function) -> Function:
    """``--max-new-tokens``, ``--temperature``, ``--top-k``, ``--top-p`` and ``--seed``: the fields of ``Sampling``."""
    share = FiniteRange(0, 1, min_open=True)
    heat = FiniteRange(0, 100)
    return _all_of(
        click.option("--max-new-tokens", type=TOKENS, metavar="N", default=512, show_default=True, help="At the most."),
        click.option("--temperature", type=heat, metavar="T", default=0.0, show_default=True, help="0: the likeliest."),
        click.option("--top-k", type=AT_LEAST_ONE, metavar="K", help="Draw from the K likeliest tokens only."),
        click.option("--top-p", type=share, metavar="P", help="Draw from the likeliest that add up to P only."),
        click.option("--seed", type=SEED, metavar="N", help="Draw the same again."),
    )(function)
