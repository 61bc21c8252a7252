"""Which figures a row of metrics.jsonl has, and how the report shows them: one table for reading, drawing and listing.

An objective or a logger may add metrics of its own. The report draws each of them in its own chart.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tt_train.records.visible import visible

MOST_OTHERS = 50  # metrics that are not in the table: as many are shown
LONGEST_NAME = 60  # characters


@dataclass(frozen=True, kw_only=True)
class Series:
    """``chart``: the name of the chart that shows the figure; None if it is not drawn."""

    name: str
    title: str = ""
    unit: str = ""
    chart: str | None = None
    label: str = ""  # next to a value
    column: str = ""  # heading in the table of figures
    panel: str = ""  # title in the picture
    from_zero: bool = True
    dashed: bool = False  # measured at some steps only
    on_page: bool = True
    tag: str = ""  # the named set of held-out rows that it is measured on, written at the line
    optional: bool = False  # in a row, and drawn, only if it was measured

    @property
    def key(self) -> str:
        """The name in the data of the page. It is unique, and never a property that every JavaScript object has."""
        return self.name if self.name in SERIES else f"metric {self.name}"


_TABLE = (
    Series(name="step", column="step"),
    Series(name="epoch"),
    Series(name="loss", chart="loss", title="Loss", unit="mean per trained token, or per pair of answers",
           label="train", column="train loss", from_zero=False),
    Series(name="lr", chart="lr", title="Learning rate", label="learning rate", column="learning rate",
           panel="Learning rate"),
    Series(name="grad_norm", chart="grad_norm", title="Gradient norm", unit="before clipping", label="gradient norm",
           column="gradient norm", panel="Gradient norm"),
    Series(name="tokens"),
    Series(name="tokens_per_s", chart="tokens_per_s", title="Throughput", unit="tokens per second",
           label="tokens per second", column="tokens/s", panel="Tokens per second"),
    Series(name="all_tokens_per_s", on_page=False),  # prompts too
    Series(name="mfu", chart="mfu", title="Model FLOPs utilization", unit="share of the device's bf16 peak",
           label="MFU", column="MFU", panel="MFU", optional=True),
    Series(name="memory_gib", chart="memory_gib", title="Memory", unit="peak GiB", label="GiB", column="GiB",
           panel="Peak memory, GiB"),
    Series(name="memory_active_gib", on_page=False, optional=True),  # of torch's allocator, on a GPU
    Series(name="memory_reserved_gib", on_page=False, optional=True),
    Series(name="elapsed_s"),
    Series(name="eta_s", on_page=False),  # an estimate that the next row replaces
    Series(name="eval_loss", chart="loss", label="held-out", column="held-out", dashed=True),
    Series(name="eval_perplexity", chart="eval_perplexity", title="Held-out perplexity", label="perplexity",
           column="perplexity", panel="Held-out perplexity", from_zero=False, dashed=True, optional=True),
    Series(name="eval_exact_match", chart="eval_exact_match", title="Exact match",
           unit="share of held-out answers", label="exact match", column="exact match", panel="Exact match",
           dashed=True, optional=True),
)  # fmt: skip
SERIES = {one.name: one for one in _TABLE}


def _of_both(name: str, title: str, unit: str) -> tuple[Series, ...]:
    """A figure of the chosen and of the rejected answers, in one chart."""
    rest: dict[str, Any] = {"chart": name, "title": title, "unit": unit, "from_zero": False}
    return tuple(
        Series(name=f"{name}_{kind}", label=kind, column=f"{title.lower()}, {kind}", panel=f"{title}, {kind}", **rest)
        for kind in ("chosen", "rejected")
    )


# what the objectives that come with the package name; a run has those of its own objective
_OF_OBJECTIVES = {
    one.name: one
    for one in (
        *_of_both("rewards", "Rewards", "beta times the log-ratio to the reference"),
        Series(name="rewards_margin", chart="rewards", label="margin", column="margin", panel="Reward margin"),
        Series(name="rewards_accuracy", chart="rewards_accuracy", title="Reward accuracy",
               unit="share of pairs whose chosen answer has the higher reward", label="accuracy", column="accuracy",
               panel="Reward accuracy"),
        *_of_both("log_probs", "Log-probabilities", "sum over the tokens of an answer"),
        *_of_both("logits", "Logits", "mean over tokens and vocabulary"),
        Series(name="kl", chart="kl", title="Divergence", unit="of the policy from the reference, at least 0",
               label="KL", column="KL", panel="Divergence"),
        Series(name="sft_loss", chart="sft_loss", title="SFT term", unit="mean per token of the chosen answers",
               label="SFT term", column="SFT term", panel="SFT term", from_zero=False),
    )
}  # fmt: skip


def other_series(name: str, *, dashed: bool, sets: Iterable[str] = ()) -> Series:
    """A metric that the table does not know: it gets a chart with its name as the title.

    One of an objective that comes with the package, or that figure of held-out rows, has a title of its own. A figure
    of one of the named ``sets`` of held-out rows is in the chart of the figure of all rows.
    """
    if tag := set_of(name, sets):
        whole = name[: -len(tag) - 1]
        like = SERIES[whole] if whole in SERIES else other_series(whole, dashed=True)
        tag = visible(tag)[:LONGEST_NAME]
        return replace(like, name=name, label=f"{like.label}, {tag}", column=f"{like.column}, {tag}", tag=tag,
                       panel="", dashed=True, optional=False)  # fmt: skip
    known = _OF_OBJECTIVES.get(name.removeprefix("eval_"))
    if known is not None and known.name == name:
        return replace(known, dashed=dashed)
    if known is not None:
        label, column, panel = (f"held-out {text}" for text in (known.label, known.column, known.panel))
        return replace(known, name=name, dashed=True, label=label, column=column, panel=panel)
    text = visible(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}...")
    return Series(
        name=name,
        chart=f"metric {name}",
        title=text,
        label=text,
        column=text,
        panel=text[:32],
        from_zero=False,
        dashed=dashed,
    )


def set_of(name: str, sets: Iterable[str]) -> str:
    """The named set of held-out rows that a figure such as ``eval_loss_news`` is of; "" if it is of all."""
    found = (one for one in sets if name.startswith("eval_") and name.endswith(f"_{one}"))
    return max(found, key=len, default="")


def charts(others: Iterable[Series] = (), *, measured: Container[str] = ()) -> dict[str, list[Series]]:
    """The charts in order, each with its series; ``measured``: the optional figures that there are."""
    found: dict[str, list[Series]] = {}
    for series in (*_TABLE, *others):
        if series.chart is not None and (not series.optional or series.name in measured):
            found.setdefault(series.chart, []).append(series)
    return found
