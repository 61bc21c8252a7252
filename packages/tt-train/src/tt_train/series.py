"""Which figures a row of metrics.jsonl has, and how the report shows them: one table for reading, drawing and listing.

An objective or a logger may add metrics of its own. The report draws each of them in its own chart.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from tt_train.visible import visible

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
    optional: bool = False  # in a row, and drawn, only if it was measured

    @property
    def key(self) -> str:
        """The name in the data of the page. It is unique, and never a property that every JavaScript object has."""
        return self.name if self.name in SERIES else f"metric {self.name}"


_TABLE = (
    Series(name="step", column="step"),
    Series(name="epoch"),
    Series(name="loss", chart="loss", title="Loss", unit="mean per trained token", label="train", column="train loss",
           from_zero=False),
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
)  # fmt: skip
SERIES = {one.name: one for one in _TABLE}


def other_series(name: str, *, dashed: bool) -> Series:
    """A metric that the table does not know: it gets a chart with its name as the title."""
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


def charts(others: Iterable[Series] = (), *, measured: Container[str] = ()) -> dict[str, list[Series]]:
    """The charts in order, each with its series; ``measured``: the optional figures that there are."""
    found: dict[str, list[Series]] = {}
    for series in (*_TABLE, *others):
        if series.chart is not None and (not series.optional or series.name in measured):
            found.setdefault(series.chart, []).append(series)
    return found
