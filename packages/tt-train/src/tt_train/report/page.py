"""The report as a self-contained HTML page: everything is inline, and its policy forbids requests."""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tt_ckpt.redaction import redact
from tt_train.records.series import SERIES, Series, charts
from tt_train.report.read import Run, measured, smooth, thin
from tt_train.report.samples import COLOURS, html_text, samples_section
from tt_train.report.sections import (
    config_section,
    evaluations_section,
    facts_section,
    manifest_section,
    reproduce_section,
)
from tt_train.report.summary import as_figure, at, method_words
from tt_train.report.tiles import comparison, tiles

BUCKETS = 300  # of rows that are drawn; each keeps the lowest and the highest value of every curve
TABLE_ROWS = 30
NOTICES = 6
DASHES = ("1 4", "9 3 2 3", "3 3", "12 4")  # of the lines of named sets of held-out rows
STYLES = {"": "none", "dashed": "7 4", "dotted": "2 3"}  # of the lines of one chart, such as chosen and rejected
HELD_OUT = "held-out "  # before the label of such a line
SMOOTHED = 8  # rows; with more of them, a smoothed curve is drawn as well

Chart = dict[str, Any]


def page(runs: Sequence[Run], *, has_picture: bool = True, notice: str | None = None) -> str:
    """The whole page, with ``notice`` above it. Every text that comes from a run is escaped; secrets are blanked."""
    others = list({one.name: one for run in runs for one in run.others}.values())
    drawn = [_chart(series) for series in charts(others, measured=measured(runs)).values()]
    folder = files("tt_train.report")
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = [_data(run, index) for index, run in enumerate(runs)]
    thinned = any(len(one["columns"].get("step", ())) < len(run.rows) for one, run in zip(data, runs, strict=True))
    slots = {
        "title": html_text(_title(runs)),
        "eyebrow": "Fine-tuning report" if len(runs) == 1 else "Comparison",
        "facts": "".join(f"<span>{html_text(text)}</span>" for text in _facts(runs)),
        "notices": _notices(notices(runs, [] if notice is None else [notice])),
        "headline": tiles(runs[0]) if len(runs) == 1 else comparison(runs),
        "charts": _charts(drawn, data, has_picture),
        "thinned": "Long runs are drawn by the lowest and highest of every stretch." if thinned else "",
        "table": "".join(_table(run, others, several=len(runs) > 1) for run in runs if run.rows),
        "evaluations": evaluations_section(runs),
        "samples": samples_section(runs),
        "config": config_section(runs),
        "reproduce": reproduce_section(runs),
        "facts_of_runs": facts_section(runs),
        "manifest": manifest_section(runs),
        "data": _json({"runs": data, "charts": drawn}),
    }
    slots = {name: redact(text) for name, text in slots.items()}
    slots["style"] = (folder / "report.css").read_text(encoding="utf-8")
    slots["script"] = script
    slots["policy"] = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match.group(1)], template)  # one pass: no value is a template


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"


def _facts(runs: Sequence[Run]) -> list[str]:
    """The line under the title: model, method, precision, device and start, if all runs agree."""
    facts: list[list[str]] = []
    for run in runs:
        model = str(at(run.manifest, "base_model") or "")
        facts.append(
            [
                Path(model).name if model.startswith(("/", ".")) else model,
                method_words(str(at(run.manifest, "method") or "")),
                _precision(run),
                _device(run),
                str(at(run.manifest, "started") or "")[:16].replace("T", " "),
                str(at(run.manifest, "state") or ""),
            ]
        )
    return [values[0] for values in zip(*facts, strict=True) if values[0] and len(set(values)) == 1]


def _precision(run: Run) -> str:
    """``bf16``, or the dtypes of the forward pass, the trained weights and the result if they differ."""
    forward = str(at(run.config, "model.dtype") or "")
    others = [(word, at(run.manifest, f"precision.{word}")) for word in ("trained", "written")]
    return ", ".join([forward, *(f"{word} in {dtype}" for word, dtype in others if dtype and dtype != forward)])


def _device(run: Run) -> str:
    """The name of the device that the run used, if the manifest contains it."""
    names = at(run.manifest, "environment.devices")
    kind, _, index = str(at(run.manifest, "device") or ("cuda" if names else "cpu")).partition(":")
    if kind == "cpu" or not isinstance(names, list) or not names:
        return str(at(run.manifest, "environment.cpu") or (kind if run.manifest else ""))
    return str(names[int(index)] if index.isdigit() and int(index) < len(names) else names[0])


def notices(runs: Sequence[Run], problems: Sequence[str] = ()) -> list[str]:
    """``problems``, and what was wrong with the run directories."""
    found = [(f"{run.name}: " if len(runs) > 1 else "") + problem for run in runs for problem in run.problems]
    found = [*problems, *found, *(f"{run.name}: no step was recorded" for run in runs if not run.rows)]
    more = len(found[NOTICES:]) + sum(run.problems.more for run in runs)
    return found[:NOTICES] + ([f"and {more:,} more like these"] if more else [])


def _notices(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{html_text(line)}</li>" for line in lines)
    return f'<div class="notices card" role="note"><ul>{items}</ul></div>'


def _data(run: Run, index: int) -> dict[str, Any]:
    """The columns that the script draws, without rows that would make no visible difference."""
    spiky = ("loss", "eval_loss", "grad_norm", "tokens_per_s", *(series.name for series in run.others))
    rows = sorted({row for name in spiky for row in thin([run.column(name)], buckets=BUCKETS)})
    columns = {series.key: series.name for series in (*SERIES.values(), *run.others) if series.on_page}
    found = ((key, run.column(name)) for key, name in columns.items())  # one at a time: a long run's are large
    kept = {key: [_rounded(values[row]) for row in rows] for key, values in found}
    if len(run.rows) > SMOOTHED:
        smoothed = smooth(run.column("loss"))
        kept["smooth"] = [_rounded(smoothed[row]) for row in rows]
    kept = {name: values for name, values in kept.items() if any(value is not None for value in values)}
    return {"name": run.name, "colour": index % COLOURS, "columns": kept}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


def _json(data: dict[str, Any]) -> str:
    """JSON for a script element: no character of it can close the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart(series: Sequence[Series]) -> Chart:
    """A chart for the script; the loss comes with a smoothed curve."""
    first, lines = series[0], []
    dashes, styles = itertools.cycle(DASHES), _styles(series)
    for one in series:
        line: dict[str, Any] = {"key": one.key, "label": one.label, "width": 1.8}
        if one.name == "loss":
            line |= {"width": 1.2, "opacity": 0.35, "faint": True}
            lines += [line, {"key": "smooth", "label": "train, smoothed", "width": 2.2, "opacity": 1}]
            continue
        line |= {"width": 1.6, "opacity": 1, "sparse": True} if one.dashed else {}
        line |= {"dash": STYLES[styles[one.label.removeprefix(HELD_OUT)]]} if styles and not one.tag else {}
        line |= {"tag": one.tag, "dash": next(dashes)} if one.tag else {}
        lines.append(line)
    head = {"name": first.chart, "title": first.title, "unit": first.unit, "zero": first.from_zero}
    return {**head, "series": lines, "styles": styles}


def _styles(series: Sequence[Series]) -> dict[str, str]:
    """The style of each figure that shares a chart with others; nothing for the loss, whose lines differ anyway."""
    labels = [] if series[0].chart == "loss" else [one.label.removeprefix(HELD_OUT) for one in series if not one.tag]
    labels = list(dict.fromkeys(labels))
    return dict(zip(labels, itertools.cycle(STYLES), strict=False)) if len(labels) > 1 else {}


def _charts(drawn: Sequence[Chart], data: Sequence[dict[str, Any]], has_picture: bool) -> str:
    """An empty frame for each chart; the script draws into it."""
    legend = {
        "loss": '<i class="raw"></i>train',
        "smooth": "<i></i>smoothed",
        "eval_loss": '<i class="held"></i>held-out',
    }
    shown = "".join(
        f"<span>{text}</span>" for key, text in legend.items() if any(key in one["columns"] for one in data)
    )
    figures = ""
    for chart in drawn:
        title, label = html_text(chart["title"]), html_text(f"{chart['title']} over the run")
        wide = len(chart["series"]) > 1
        unit = f'<span class="unit">{chart["unit"]}</span>' if chart["unit"] else ""
        legends = shown if chart["name"] == "loss" else _legend(chart)
        legends = f'<div class="legend">{legends}</div>' if legends else ""
        figures += (
            f'<figure class="chart card{" wide" * wide}" data-chart="{html_text(chart["name"])}" data-label="{label}">'
            f"<figcaption><h3>{title}{unit}</h3>{legends}</figcaption>"
            f'<div class="plot" tabindex="0" role="group" aria-label="{label}; arrow keys read it off"></div></figure>'
        )
    missing = "The curves need JavaScript. "
    missing += "The PNG beside this page shows the same, and so does" if has_picture else "The same figures are in"
    missing += " the table below."
    return f'<div class="charts">{figures}</div><noscript><p class="note">{missing}</p></noscript>'


def _legend(chart: Chart) -> str:
    legend = "".join(
        f'<span><i class="{style}"></i>{html_text(label)}</span>' for label, style in chart["styles"].items()
    )
    held_out = legend and any(line["label"].startswith(HELD_OUT) for line in chart["series"])
    return legend + ('<span><i class="held"></i>held-out</span>' if held_out else "")


def _table(run: Run, others: Sequence[Series], *, several: bool) -> str:
    """The curves as text, at evenly spaced steps."""
    columns = [
        SERIES["step"],
        *(series for chart in charts(others, measured=measured([run])).values() for series in chart),
    ]
    stride = max(1, -(-len(run.rows) // TABLE_ROWS))
    shown = [run.rows[index] for index in sorted({*range(0, len(run.rows), stride), len(run.rows) - 1})]
    head = "".join(f'<th scope="col">{html_text(series.column)}</th>' for series in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{as_figure(row.get(series.name))}</td>" for series in columns) + "</tr>" for row in shown
    )
    of = f" of {html_text(run.name)}" if several else ""
    return (
        f'<details><summary>Figures{of} as a table</summary><div class="card scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )
