"""The options that several verbs share, each with one wording, and the numbers that options take."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tt_cli.names import complete_config, complete_keys, complete_runnable

if TYPE_CHECKING:
    import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class Number(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click only
    """A finite number within bounds. The help does not list them: most are only what a machine can hold."""

    name = "number"

    def __init__(self, bounds: click.IntRange | click.FloatRange) -> None:
        self.bounds = bounds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = self.bounds.convert(value, param, ctx)
        if not math.isfinite(number):  # nan compares as neither below nor above a bound
            self.fail(f"{value} is not a finite number; write a decimal number such as 0.7", param, ctx)
        return number


COUNT = Number(click.IntRange(0, 10**9))
AT_LEAST_ONE = Number(click.IntRange(1, 10**9))
TOKENS = Number(click.IntRange(1, 2**24))
SAMPLES = Number(click.IntRange(1, 10_000))  # each is in memory, with those of some hundred prompts
SEED = Number(click.IntRange(0, 2**64 - 1))  # torch's
SHARE = Number(click.FloatRange(0, 1, min_open=True))
TEMPERATURE = Number(click.FloatRange(0, 100))


def _all_of(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """One decorator for several; the help lists them in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def config_words(metavar: str = "RECIPE|CONFIG|FILE.py", *, optional: bool = False) -> Callable[[Function], Function]:
    """What a verb about a config takes: ``what``, ``overrides``, ``config_file`` and ``allow_import``."""
    return _all_of(
        click.argument("what", metavar=metavar, required=not optional, shell_complete=complete_runnable),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys),
        click.option(
            "--config",
            "config_file",
            metavar="CONFIG",
            type=click.Path(),
            shell_complete=complete_config,
            help="YAML file, or name of a config that comes with tt (`tt ls configs`).",
        ),
        click.option(
            "--allow-import",
            multiple=True,
            metavar="PKG.MOD",
            help="Allow the config to use components of this module. Can be repeated.",
        ),
    )


def json_option(function: Function) -> Function:
    """``--json``, given to the verb as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object.")(function)


def dry_run_option(function: Function) -> Function:
    """``--dry-run`` of a verb that writes."""
    return click.option("--dry-run", is_flag=True, help="Check, say what would be written or removed, and stop.")(
        function
    )


def base_option(function: Function) -> Function:
    """``--base``: where the base of an adapter is, and in which form it computes."""
    return click.option(
        "--base",
        multiple=True,
        metavar="DIR|nf4|dense",
        show_default="as in training",
        help="Base model of the adapter: the directory that it has moved to, or how to load it (nf4: in 4 bits; dense: "
        "as its files store it). Can be given twice, for both.",
    )(function)


def device_option(function: Function) -> Function:
    """``--device`` of a verb that computes with a model; ``pick_device`` reads it."""
    return click.option("--device", metavar="DEVICE", default="auto", show_default=True, help="Device to compute on.")(
        function
    )


def dtype_option(default: str) -> Callable[[Function], Function]:
    """``--dtype``; ``default`` says what is written without it."""
    kinds = click.Choice(["fp32", "bf16", "fp16"])
    return click.option("--dtype", type=kinds, show_default=default, help="Data type of the weights written.")


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The value of ``--dtype`` as torch has it."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[name]


def output_option(help: str) -> Callable[[Function], Function]:
    """The argument ``OUTPUT`` and the option ``-o``, of which exactly one must be given: see ``chosen_output``."""
    return _all_of(
        click.argument("output_word", metavar="[OUTPUT]", required=False, type=click.Path(path_type=Path)),
        click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help=help),
    )


def chosen_output(word: Path | None, option: Path | None) -> Path:
    """The one that was given."""
    if word is not None and option is not None:
        raise click.UsageError(
            f"two outputs, '{word}' and -o {option}; give only one of them", click.get_current_context()
        )
    found = word or option
    if found is None:
        raise click.UsageError("no output: name the directory to write, as in -o DIR", click.get_current_context())
    return found


def sampling_options(function: Function) -> Function:
    """How tokens are drawn and where an answer ends: the fields of ``tt_cli.talk.Sampling``, None if not given."""
    own = "generation_config.json's"
    return _all_of(
        click.option("--max-new-tokens", type=TOKENS, metavar="N", show_default=f"{own}, or 512",
                     help="Maximum number of new tokens."),
        click.option("--temperature", type=TEMPERATURE, metavar="T", show_default=f"{own}, or 0",
                     help="Sampling temperature; 0 always takes the likeliest token."),
        click.option("--top-k", type=COUNT, metavar="K", show_default=own,
                     help="Sample from the K likeliest tokens only; 0: from all."),
        click.option("--top-p", type=SHARE, metavar="P", show_default=own,
                     help="Sample from the likeliest tokens whose probabilities add up to P; 1: from all."),
        click.option("--min-p", type=Number(click.FloatRange(0, 1)), metavar="P", show_default=own,
                     help="Sample from tokens at least P times as likely as the likeliest one."),
        click.option("--repetition-penalty", type=Number(click.FloatRange(0.001, 1000)), metavar="X", show_default=own,
                     help="Above 1: tokens of the prompt and the answer become less likely; 1: no penalty."),
        click.option("--stop", metavar="TEXT", multiple=True, show_default=own,
                     help="Text that ends the answer and is not part of it. Can be repeated."),
        click.option("--seed", type=SEED, metavar="N", help="Random seed; the same seed gives the same answer."),
    )(function)  # fmt: skip
