"""The figures of an evaluation: as rows, as a table of several models, and as files in a run directory."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tt_ckpt import files
from tt_train.records.evaluations import FOLDER
from tt_train.records.run_files import number, own_folder


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number. ``filter``: what lm-eval did with the answers first; ``stderr``: the standard error, if known."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    filter: str = "none"
    version: str | float | None = None
    num_fewshot: int | None = None
    rows: int | None = None
    higher_is_better: bool | None = None


def figures_of(raw: Mapping[str, Any]) -> list[Figure]:
    """The numbers in the results of lm-eval, in its order; a group's are behind those of its tasks."""
    found = []
    for task, values in {**raw.get("results", {}), **raw.get("groups", {})}.items():
        better = raw.get("higher_is_better", {}).get(task) or {}
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            figure = number(value)
            if not comma or metric.endswith("_stderr") or figure is None:
                continue
            found.append(
                Figure(
                    task=task, metric=metric, value=figure, filter=filter_name,
                    stderr=number(values.get(f"{metric}_stderr,{filter_name}")),
                    version=raw.get("versions", {}).get(task), num_fewshot=raw.get("n-shot", {}).get(task),
                    rows=(raw.get("n-samples", {}).get(task) or {}).get("effective"),
                    higher_is_better=better.get(metric),
                )
            )  # fmt: skip
    return found


def table(of_models: Mapping[str, Sequence[Figure]]) -> list[list[str]]:
    """Cells, the head first: a row for each metric of each task, a column for each model."""
    rows: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for model, figures in of_models.items():
        for figure in figures:
            rows.setdefault((figure.task, figure.metric, figure.filter), {})[model] = figure
    filtered = any(key[2] != "none" for key in rows)
    head = ["task", "version", "n-shot", "rows", "metric", *(["filter"] if filtered else []), *of_models]
    lines = []
    for (task, metric, filter_name), cells in rows.items():
        some = next(iter(cells.values()))
        arrow = {True: " \u2191", False: " \u2193"}.get(some.higher_is_better, "")  # type: ignore[arg-type]
        facts = ["" if fact is None else str(fact) for fact in (some.version, some.num_fewshot, some.rows)]
        lines.append([task, *facts, metric + arrow, *([filter_name] if filtered else []),
                      *(_cell(cells.get(model)) for model in of_models)])  # fmt: skip
    return [head, *lines]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    error = "" if figure.stderr is None else f" \u00b1 {figure.stderr:.4f}"
    return f"{figure.value:.4f}{error}"


def as_rows(of_models: Mapping[str, Sequence[Figure]]) -> list[dict[str, Any]]:
    """Every figure with its model, ready for JSON."""
    return [{"model": model, **asdict(figure)} for model, figures in of_models.items() for figure in figures]


def save(run: Path, name: str, text: str) -> Path:
    """Write an evaluation of a run into a new file of its folder ``evals``; ``name`` is the end of the file's."""
    folder = own_folder(run, FOLDER)
    folder.mkdir(exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, count = folder / f"{stamp}-{name}", 1
    while True:
        try:
            with files.create(path) as file:  # new, also if another process evaluates the run at the same time
                file.write(text.encode("utf-8", "backslashreplace"))
                files.sync(file)
            return path
        except FileExistsError:
            count += 1
            path = folder / f"{stamp}-{count}-{name}"
