"""The figures that sum a run up, defined once for the console, the model card, ``tt ls runs`` and the report.

They are counted from the rows of metrics.jsonl, whose ``tokens`` are trained tokens since the start. Below them: how
the report writes numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tt_train.records.run_files import number
from tt_train.report.read import Run

Row = Mapping[str, Any]
SHARE = 0.05  # of the steps of a run of one epoch
FEWEST = 10  # steps: a partial batch alone would say nothing
DASH = "\u2013"
CLOSED = 24  # characters of an answer to a question that has only one


def training_loss(rows: Sequence[Row]) -> float | None:
    """The mean over the trained tokens of the last part of the run (``last_part``); None if there is no loss."""
    rows = _steps(rows)
    begin = len(rows) - len(last_part(rows))
    weighted = [
        (row["loss"], tokens)
        for row, tokens in zip(rows[begin:], step_tokens(rows)[begin:], strict=True)
        if row.get("loss") is not None and tokens > 0
    ]
    total = sum(tokens for _, tokens in weighted)
    return sum(loss * tokens for loss, tokens in weighted) / total if total else None


def last_part(rows: Sequence[Row]) -> Sequence[Row]:
    """The steps of the last epoch; in a run of at most one epoch, the last 5 % of its steps, but at least 10."""
    rows = _steps(rows)
    end = rows[-1].get("epoch") if rows else None
    if end is not None and end > 1:
        return rows[next(i for i, row in enumerate(rows) if (row.get("epoch") or 0) > end - 1 + 1e-6) :]
    return rows[-max(FEWEST, math.ceil(SHARE * len(rows))) :]


def part_name(rows: Sequence[Row]) -> str:
    """What ``training_loss`` is the mean of, for people; with ``log_every`` not every step has a figure."""
    part = last_part(rows)
    end, count = rows[-1].get("epoch") if rows else None, len(part)
    apart = max((after["step"] - before["step"] for before, after in pairwise(part)
                 if before.get("step") and after.get("step")), default=1)  # fmt: skip
    if end is not None and end > 1:
        return f"{count:,} steps of the last epoch" if apart > 1 else "last epoch"
    if count == 1:
        return "one step"
    return f"last {count:,} steps that were written" if apart > 1 else f"last {count:,} steps"


def _steps(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows without the evaluation before the first step."""
    return rows[next((i for i, row in enumerate(rows) if row.get("step") != 0), len(rows)) :]


def tokens_per_second(rows: Sequence[Row]) -> float | None:
    """Trained tokens divided by the time of the steps, without evaluation, samples and checkpoints."""
    total = seconds = 0.0
    for row, tokens in zip(rows, step_tokens(rows), strict=True):
        speed = row.get("tokens_per_s")
        if speed and speed > 0 and tokens > 0:
            total, seconds = total + tokens, seconds + tokens / speed
    return total / seconds if seconds else None


def step_tokens(rows: Sequence[Row]) -> list[float]:
    """The trained tokens of each step; 1 each if the rows do not contain them."""
    counts = [float(row["tokens"]) for row in rows if row.get("tokens") is not None]
    if len(counts) < len(rows):
        return [1.0] * len(rows)
    steps = [count - last for count, last in zip(counts, [0.0, *counts], strict=False)]
    if steps and (rows[0].get("step") or 1) > 1:  # the first rows are lost
        steps[0] /= rows[0]["step"]
    return [max(0.0, step) for step in steps]


def method_words(method: str) -> str:
    """A run's method for people; for QLoRA, with the base that it was trained and evaluated on."""
    return f"{method} over a base of 4 bits (NF4)" if method == "qlora" else method


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A figure is None if the run does not contain it."""

    steps: int
    loss_first: float | None
    loss_last: float | None  # of the run's last part, see ``training_loss``
    loss_over: str  # which part
    eval_last: float | None
    eval_best: float | None
    eval_best_step: float | None
    eval_sets: dict[str, float]  # the last held-out loss of each named set
    perplexity: float | None  # of held-out rows, at last
    exact_match: float | None
    tokens: float | None
    seconds: float | None
    tokens_per_s: float | None
    memory_gib: float | None  # peak
    epochs: float | None
    parameters: float | None
    trainable: float | None
    rows: float | None
    eval_rows: float | None
    packs: float | None
    truncated: float | None
    dropped: dict[str, float] = field(default_factory=dict)  # reason: rows
    closed: bool = False  # whether another answer than the expected one is wrong
    matches: tuple[int, int, int] | None = None  # samples answered as expected at first, at last, of how many

    @property
    def lost(self) -> float:
        return sum(self.dropped.values())

    @property
    def right(self) -> float | None:
        return self.matches[1] / self.matches[2] if self.matches else None


def headline(run: Run) -> Headline:
    losses, evals = run.figures("loss"), run.figures("eval_loss")
    best = min(run.held("eval_loss"), default=(None, None), key=lambda pair: pair[1])
    rows = run.rows.only("step", "epoch", "loss", "tokens", "tokens_per_s")
    dropped = at(run.manifest, "data.report.dropped")
    return Headline(
        steps=int(run.rows[-1]["step"] or 0) if run.rows else 0,
        loss_first=losses[0] if losses else None,
        loss_last=training_loss(rows),
        loss_over=part_name(rows),
        eval_last=evals[-1] if evals else None,
        eval_best=best[1],
        eval_best_step=best[0],
        eval_sets={
            one.tag: found[-1] for one in run.others if one.chart == "loss" and (found := run.figures(one.name))
        },
        perplexity=next(reversed(run.figures("eval_perplexity")), None),
        exact_match=next(reversed(run.figures("eval_exact_match")), None),
        tokens=max(run.figures("tokens"), default=None),
        seconds=max(run.figures("elapsed_s"), default=None),
        tokens_per_s=tokens_per_second(rows),
        memory_gib=max(run.figures("memory_gib"), default=None),
        epochs=max(run.figures("epoch"), default=None),
        parameters=_number(run.manifest, "parameters"),
        trainable=_number(run.manifest, "trainable"),
        rows=_number(run.manifest, "data.rows") or _number(run.manifest, "data.report.rows"),  # of a stream, those read
        eval_rows=_number(run.manifest, "data.held_out_rows"),
        packs=_number(run.manifest, "data.report.packs"),
        truncated=_number(run.manifest, "data.report.truncated"),
        dropped={key: value for key, value in dropped.items() if _is_number(value)}
        if isinstance(dropped, dict)
        else {},
        closed=is_closed(run),
        matches=_matches(run),
    )


def at(values: Any, dotted: str) -> Any:
    """``values["a"]["b"]`` for ``a.b``; None if there is no such key."""
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _number(values: dict[str, Any], dotted: str) -> float | None:
    value = at(values, dotted)
    return value if _is_number(value) else None


def answers(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The samples of a run by prompt, each list in the order of steps."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        grouped.setdefault(str(sample["prompt"]), []).append(sample)
    for samples in grouped.values():
        samples.sort(key=lambda sample: sample["step"] if _is_number(sample.get("step")) else math.inf)
    return grouped


def is_expected(sample: dict[str, Any]) -> bool | None:
    """Whether the answer is the expected one, apart from blanks around it; None if nothing is expected."""
    if not isinstance(sample.get("expected"), str):
        return None
    return bool(str(sample.get("generation", "")).strip() == sample["expected"].strip())


def is_closed(run: Run) -> bool:
    """Whether every expected answer is short: only then is a different answer wrong."""
    expected = [sample["expected"].strip() for sample in run.samples if isinstance(sample.get("expected"), str)]
    return bool(expected) and all(len(text) <= CLOSED and "\n" not in text for text in expected)


def _matches(run: Run) -> tuple[int, int, int] | None:
    checked = [samples for samples in answers(run).values() if is_expected(samples[-1]) is not None]
    if not checked:
        return None
    before = sum(is_expected(samples[0]) is True for samples in checked)
    return before, sum(is_expected(samples[-1]) is True for samples in checked), len(checked)


def _is_number(value: Any) -> bool:
    return number(value) is not None


def as_figure(value: float | None, digits: int = 4) -> str:
    """0.4213, 12,345, 2.0e-05, or a dash."""
    if value is None:
        return DASH
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def as_count(value: float | None) -> str:
    """950, 12.3k, 134M, 8.03B, or a dash."""
    if value is None:
        return DASH
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}"


def as_time(seconds: float | None) -> str:
    """38 s, 4 min 05 s, 2 h 14 min, or a dash."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def as_percent(share: float | None) -> str:
    """0.42 %, 12 %, 100 %, or a dash."""
    if share is None:
        return DASH
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
