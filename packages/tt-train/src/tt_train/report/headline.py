"""The figures that sum a run up, defined once for the console, the model card, ``tt ls runs`` and the report.

They are counted from the rows of metrics.jsonl, whose ``tokens`` are trained tokens since the start.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
SHARE = 0.05  # of the steps of a run of one epoch
FEWEST = 10  # steps: a partial batch alone would say nothing


def training_loss(rows: Sequence[Row]) -> float | None:
    """The mean over the trained tokens of the run's last part, see ``last_part``; None if nothing is known."""
    rows = _steps(rows)
    begin = len(rows) - len(last_part(rows))
    weighted = [
        (row["loss"], tokens)
        for row, tokens in list(zip(rows, step_tokens(rows), strict=True))[begin:]
        if row.get("loss") is not None and tokens > 0
    ]
    total = sum(tokens for _, tokens in weighted)
    return sum(loss * tokens for loss, tokens in weighted) / total if total else None


def last_part(rows: Sequence[Row]) -> Sequence[Row]:
    """The steps of the last epoch; in a run of one epoch at most, the last 5 % of its steps, but no fewer than 10."""
    rows = _steps(rows)
    end = rows[-1].get("epoch") if rows else None
    if end is not None and end > 1:
        return [row for row in rows if row.get("epoch") is not None and row["epoch"] > end - 1 + 1e-6]
    return rows[-max(FEWEST, math.ceil(SHARE * len(rows))) :]


def part_name(rows: Sequence[Row]) -> str:
    """What ``training_loss`` is the mean of, for people."""
    end = rows[-1].get("epoch") if rows else None
    if end is not None and end > 1:
        return "last epoch"
    count = len(last_part(rows))
    return f"last {count:,} steps" if count != 1 else "one step"


def _steps(rows: Sequence[Row]) -> Sequence[Row]:
    """Without the evaluation before the first step."""
    return [row for row in rows if row.get("step") != 0]


def tokens_per_second(rows: Sequence[Row]) -> float | None:
    """Trained tokens by the time that the steps took; evaluation, samples and checkpoints are no part of it."""
    total = seconds = 0.0
    for row, tokens in zip(rows, step_tokens(rows), strict=True):
        speed = row.get("tokens_per_s")
        if speed and speed > 0 and tokens > 0:
            total, seconds = total + tokens, seconds + tokens / speed
    return total / seconds if seconds else None


def step_tokens(rows: Sequence[Row]) -> list[float]:
    """The trained tokens of each step; 1 each where the rows do not say."""
    counts = [float(row["tokens"]) for row in rows if row.get("tokens") is not None]
    if len(counts) < len(rows):
        return [1.0] * len(rows)
    steps = [count - last for count, last in zip(counts, [0.0, *counts], strict=False)]
    if steps and (rows[0].get("step") or 1) > 1:  # the first rows are lost
        steps[0] /= rows[0]["step"]
    return [max(0.0, step) for step in steps]


def method_words(method: str) -> str:
    """A run's method for people; after QLoRA with the base that it was trained and scored on."""
    return f"{method} over a base of 4 bits (NF4)" if method == "qlora" else method
