"""Numbers that options take, each with its bounds: a number beyond them is answered before anything is loaded."""

import math
from typing import Any

import click

COUNT = click.IntRange(0, 10**9)
AT_LEAST_ONE = click.IntRange(1, 10**9)
TOKENS = click.IntRange(1, 2**24)
SEED = click.IntRange(0, 2**64 - 1)  # torch's


class FiniteRange(click.FloatRange):
    """A range that nan is not in, which compares as neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number; write a decimal number such as 0.7", param, ctx)
        return number
