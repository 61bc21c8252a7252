"""Several models evaluated one after the other, by one process or by many that share the work of each."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_data
import tt_train
from tt_ckpt import files
from tt_ckpt.redaction import redact_data
from tt_ckpt.shown import plain
from tt_train.devices.distributed import world
from tt_train.devices.launch import everywhere
from tt_train.errors import ConfigError
from tt_train.evals.results import Figure, as_rows, save
from tt_train.evals.rows import Rows, evaluate_rows, rows_of
from tt_train.evals.score import ModelOptions, Scorer, open_model
from tt_train.evals.tasks import Loaded, Settings, evaluate, find_tasks, load_tasks
from tt_train.models.origin import Origin, find_origin
from tt_train.records.evaluations import FOLDER

Progress = Callable[[str, int, int], None]
Tell = Callable[[str], None]


@dataclass(kw_only=True)
class Report:
    """What was found about one model. ``facts``: what else its file says; ``samples``: a row for each answer."""

    model: str
    origin: Origin
    figures: list[Figure]
    facts: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)


def check_models(paths: Sequence[str], base: Sequence[str]) -> list[Origin]:
    """ConfigError if one of them is not there, before the first is evaluated."""
    origins = [find_origin(path, tuple(base) or None) for path in paths]
    if len(set(paths)) < len(paths):
        raise ConfigError([f"{next(path for path in paths if paths.count(path) > 1)}: given twice; give it once"])
    return origins


def check_places(origins: Sequence[Origin], output: Path | None, *, samples: bool) -> None:
    """ConfigError if the results cannot be written, before hours are spent on them. What is there stays."""
    if output is not None:
        for path in (output, output.with_suffix(".samples.jsonl"))[: 2 if samples else 1]:
            if os.path.lexists(path):
                raise ConfigError([f"{plain(path)}: already there; remove it, or name another file for the results"])
        places = [output.absolute().parent]
    else:
        runs = [origin.run.path for origin in origins if origin.run is not None]
        places = [next(place for place in (run / FOLDER, run) if place.is_dir()) for run in runs]
    for place in places:
        if not place.is_dir():
            raise ConfigError([f"{plain(place)}: no such folder for the results; make it, or choose another -o"])
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError([f"{plain(place)}: the results cannot be written here; name a file elsewhere with -o"])


def on_tasks(
    paths: Sequence[str], settings: Settings, options: ModelOptions, *, tell: Tell, progress: Progress | None = None
) -> list[Report]:
    """Run tasks of lm-eval for each model; rank 0 has the reports.

    ConfigError names models, tasks and rows that cannot be had before weights load.
    """
    everywhere(lambda: check_models(paths, options.base))

    def prepared() -> tuple[Any, Loaded] | None:
        if not world().is_main:
            return None
        manager = find_tasks(settings)
        return manager, load_tasks(manager, settings)

    found = everywhere(prepared)
    reports = []
    for number, path in enumerate(paths):
        if found is None:
            everywhere(partial(open_model, path, options, tell=tell))[0].serve()
            continue
        from tt_train.evals.harness import TT

        manager, tasks = found
        model = everywhere(partial(TT.of, path, options, tell=tell, progress=progress))
        try:
            done = evaluate(model, tasks if number == 0 else load_tasks(manager, settings), settings, tell=tell)
        finally:
            model.scorer.leave()
        samples = [{"task": task, **row} for task, rows in done.samples.items() for row in rows]
        facts = {"tasks": asdict(settings), "lm_eval": done.raw}
        reports.append(Report(model=path, origin=model.origin, figures=done.figures, facts=facts, samples=samples))
    return reports


def on_rows(
    paths: Sequence[str],
    asked: Rows,
    options: ModelOptions,
    *,
    tell: Tell,
    tell_rows: Callable[[Sequence[str]], None],
    progress: Progress | None = None,
) -> list[Report]:
    """Evaluate each model on rows of one's own; rank 0 has the reports."""
    everywhere(lambda: check_models(paths, options.base))
    reports = []
    for path in paths:

        def opened(path: str = path) -> tuple[Scorer, Origin, Any]:
            scorer, origin = open_model(path, options, tell=tell, progress=progress)
            longest = options.max_length or _positions(origin) or scorer.max_length
            return scorer, origin, rows_of(origin, asked, scorer.tokenizer, longest=longest)

        scorer, origin, rows = everywhere(opened)
        if world().is_main:
            tell_rows(tt_data.summary_lines(rows.report))
        figures, said = evaluate_rows(scorer, rows, asked, tell=tell)
        texts = zip(said.prompts, said.answers, said.expected, strict=True)
        samples = [{"prompt": prompt, "answer": answer, "expected": expected} for prompt, answer, expected in texts]
        facts = {"data": asked.source, "data_report": dict(rows.report)}
        reports.append(Report(model=path, origin=origin, figures=figures, facts=facts, samples=samples))
    return reports if world().is_main else []


def _positions(origin: Origin) -> int | None:
    """``max_position_embeddings`` of config.json: rows are read before weights load."""
    stated = {} if origin.model is None else tt_ckpt.read_config(origin.model)
    found = stated.get("text_config", stated).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def document(reports: Sequence[Report], options: ModelOptions) -> str:
    """The JSON file about one model or several."""
    made = {
        "results": as_rows({report.model: report.figures for report in reports}),
        "models": {report.model: report.facts for report in reports},
        "options": asdict(options),
        "versions": {"tt-train": tt_train.__version__, "torch": torch.__version__},
    }
    return json.dumps(redact_data(json.loads(json.dumps(made, default=str))), indent=2, ensure_ascii=False) + "\n"


def write(reports: Sequence[Report], options: ModelOptions, output: Path | None, *, samples: bool) -> list[Path]:
    """Write the results to ``output``, or those of each run into its folder ``evals``; the paths of the new files."""
    if output is not None:
        files.replace_text(output, document(reports, options))
        written = [output]
        if samples:
            beside = output.with_suffix(".samples.jsonl")
            files.replace_text(beside, "".join(_lines(report) for report in reports))
            written.append(beside)
        return written
    written = []
    for report in reports:
        if report.origin.run is not None:
            run = report.origin.run.path
            written.append(save(run, "results.json", document([report], options)))
            if samples:
                written.append(save(run, "samples.jsonl", _lines(report)))
    return written


def _lines(report: Report) -> str:
    rows = ({"model": report.model, **row} for row in report.samples)
    return "".join(
        json.dumps(redact_data(json.loads(json.dumps(row, default=str))), ensure_ascii=False) + "\n" for row in rows
    )
