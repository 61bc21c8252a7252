"""Reading a run directory for the report: rows, samples, manifest and config, in whatever state they are."""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tt_ckpt.shown import plain, quoted
from tt_train.config import named_sets
from tt_train.records.evaluations import newest
from tt_train.records.figures import Figures
from tt_train.records.problems import Problems
from tt_train.records.run_files import FinishedRun, json_lines, number
from tt_train.records.series import MOST_OTHERS, SERIES, Series, other_series
from tt_train.records.visible import visible


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. ``rows`` are sorted by step, one row for each step. A figure that is not finite is None or missing."""

    path: Path
    name: str
    rows: Figures
    others: list[Series] = field(default_factory=list)  # metrics that SERIES does not know
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def column(self, name: str) -> list[float | None]:
        return self.rows.column(name)

    def figures(self, name: str) -> list[float]:
        """The finite values of a column."""
        return [value for value in self.column(name) if value is not None]

    def held(self, name: str) -> list[tuple[float, float]]:
        """The steps that have a figure, with its values."""
        pairs = zip(self.column("step"), self.column(name), strict=True)
        return [(step or 0, value) for step, value in pairs if value is not None]


def measured(runs: Sequence[Run]) -> set[str]:
    """The optional figures that some run has."""
    return {one.name for one in SERIES.values() if one.optional and any(run.figures(one.name) for run in runs)}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run, under names that tell them apart. One error names all paths that are not runs."""
    if not paths:
        raise ValueError("a report needs at least one run directory")
    missing = [plain(path) for path in paths if not os.path.lexists(path / "metrics.jsonl")]
    if missing:
        raise FileNotFoundError(
            f"no metrics.jsonl in {', '.join(missing)}: expected a run directory, as `tt run` writes it (`tt ls runs`)"
        )
    names = [path.resolve().name for path in paths]
    shown = [visible(name if names.count(name) == 1 else str(path)) for name, path in zip(names, paths, strict=True)]
    return [read_run(path, name=name) for path, name in zip(paths, shown, strict=True)]


def read_run(path: Path, *, name: str) -> Run:
    problems = Problems()
    rows = Figures()
    others: dict[str, int] = {}  # metric: number of rows that have it
    left_out: set[str] = set()  # the first name that is too many
    for record in json_lines(path / "metrics.jsonl", problems):
        metrics = _other_metrics(record, others, left_out)
        row = {key: number(value) for key, value in record.items() if key in SERIES or key in metrics}
        step = row.get("step")
        if step is not None:
            rows.append(row)
            problems.extend(
                f"step {step:g}: {key} was {quoted(record[key])}"
                for key in ("loss", "grad_norm", "eval_loss", *metrics)
                if row.get(key) is None and record.get(key) is not None
            )
    for key in left_out:
        problems.append(f"metrics.jsonl: left out: metric {key!r:.100} and later ones, after {MOST_OTHERS} others")
    rows, run = rows.by_step(), FinishedRun(path)
    config = _unless_damaged("config.yaml", run.config_file, path, problems)
    section = config.get("data")
    sets = [str(name) for name in named_sets(section.get("eval") if isinstance(section, dict) else None)]
    return Run(
        path=path,
        name=name,
        rows=rows,
        others=[other_series(key, dashed=2 * count < len(rows), sets=sets) for key, count in others.items()],
        config=config,
        manifest=_unless_damaged("manifest.json", lambda: run.manifest, path, problems),
        evaluations=newest(path, problems),
        samples=[record for record in json_lines(path / "samples.jsonl", problems) if "prompt" in record],
        problems=problems,
    )


def _other_metrics(record: dict[str, Any], known: dict[str, int], left_out: set[str]) -> list[str]:
    """The metrics of a row that SERIES does not have, counted in ``known``; if there are too many, only some."""
    found = []
    for key, value in record.items():
        if key in SERIES or type(value) not in (int, float):
            continue
        if key in known or len(known) < MOST_OTHERS:
            known[key] = known.get(key, 0) + 1
            found.append(key)
        else:
            left_out.update([] if left_out else [key])
    return found


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """A straight line fitted around each value, its neighbours weighted by e^-distance over a fortieth of the run.

    A mean would bend the ends of a falling curve towards its middle. Gaps stay gaps.
    """
    before = array("d", chain.from_iterable(_moments(values)))
    smoothed: list[float | None] = [None] * len(values)
    for place, after in zip(reversed(range(len(values))), _moments(values[::-1]), strict=True):
        if (value := values[place]) is not None:
            smoothed[place] = _intercept(value, before[5 * place : 5 * place + 5], after)
    return smoothed


def _moments(values: Sequence[float | None]) -> Iterator[tuple[float, float, float, float, float]]:
    """Before each value: the sums of w, w d, w d^2, w y and w d y over distance d, weight w and value y."""
    decay = 1 - 1 / max(1.0, len(values) / 40)
    w = wd = wdd = wy = wdy = 0.0
    for value in values:
        wdd, wd, wdy = decay * (wdd + 2 * wd + w), decay * (wd + w), decay * (wdy + wy)
        w, wy = decay * w, decay * wy
        yield w, wd, wdd, wy, wdy
        if value is not None:
            w, wy = w + 1, wy + value


def _intercept(value: float, before: Sequence[float], after: Sequence[float]) -> float:
    """The height at d = 0 of the line through a value and what is before (d < 0) and after it."""
    w, wdd, wy = 1 + before[0] + after[0], before[2] + after[2], value + before[3] + after[3]
    wd, wdy = after[1] - before[1], after[4] - before[4]
    spread = w * wdd - wd * wd
    return (wdd * wy - wd * wdy) / spread if spread > 1e-9 * w * w else wy / w


def thin(columns: Sequence[Sequence[float | None]], *, buckets: int) -> list[int]:
    """Which rows to draw: the lowest and the highest of every column in each bucket, so that no spike is lost."""
    length = len(columns[0])
    if length <= 2 * buckets:
        return list(range(length))
    kept = {0, length - 1}
    for bucket in range(buckets):
        indices = range(bucket * length // buckets, (bucket + 1) * length // buckets)
        for column in columns:
            finite = [(value, index) for index in indices if (value := column[index]) is not None]
            if finite:
                kept.update((min(finite)[1], max(finite)[1]))
    return sorted(kept)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The dotted keys whose values are not the same in every config, in the order of their first appearance.

    A section that some configs do not have (``adapter`` of a full fine-tune) is one key.
    """
    flat = [flatten(config) if config else {} for config in configs]
    absent = {key for one in flat for key, value in one.items() if value is None}
    sections = {key for key in absent if any(other.startswith(f"{key}.") for one in flat for other in one)}
    keys = dict.fromkeys(_section(key, sections) for one in flat for key in one)
    missing = object()
    return [
        key
        for key in keys
        if key in sections
        or (key != "output_dir" and any(one.get(key, missing) != flat[0].get(key, missing) for one in flat[1:]))
    ]


def _section(key: str, sections: set[str]) -> str:
    return next((section for section in sections if key.startswith(f"{section}.")), key)


def value_at(config: dict[str, Any], key: str) -> tuple[bool, Any]:
    """Whether a config has a dotted key, and its value (a mapping for a section)."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _unless_damaged(name: str, read: Callable[[], dict[str, Any]], path: Path, problems: list[str]) -> dict[str, Any]:
    """The result of ``read``; {} if the file cannot be read, with the reason in ``problems``."""
    if not os.path.lexists(path / name):
        problems.append(f"{name}: not there")
        return {}
    try:
        return read()
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name}: left out ({str(error).splitlines()[0]})")
        return {}
