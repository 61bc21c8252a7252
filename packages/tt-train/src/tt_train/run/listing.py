"""The runs of a folder in figures, for ``tt ls runs``. Read from their files, without torch."""

import logging
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from tt_ckpt import files
from tt_ckpt.shown import plain
from tt_train.records.evaluations import newest
from tt_train.records.run_files import is_run, number, read_manifest, read_rows
from tt_train.report.summary import training_loss
from tt_train.run.lock import writer_of

log = logging.getLogger("tt_train")

STATES = ("running", "stopped", "failed", "dead", "finished", "damaged")
_HEADLINE = ("step", "epoch", "loss", "tokens")
_LAST_BYTES = 1_000_000  # of metrics.jsonl, for the last step and the loss of a run that is not finished


class ListedRun(TypedDict):
    """A row of ``tt ls runs``; None if the run does not say. ``loss``: see ``training_loss``.

    ``best_eval_loss``: the lowest held-out loss after step 0, at ``best_step``. ``evaluation``: the figures of the
    newest ``tt eval`` of the run, as ``records.evaluations.newest`` gives them. ``bytes``: of all files of the run.
    ``changed``: when its state last changed, in the local time zone.
    """

    path: str
    recipe: str | None
    model: str | None
    method: str | None
    state: str | None
    step: int | None
    steps_total: int | None
    loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    evaluation: list[dict[str, Any]]
    bytes: int
    changed: str


def list_runs(root: str | Path = "runs") -> list[ListedRun]:
    """The runs under ``root``, newest first: path, state, model, last step, losses and size.

    A run whose files are not as a run writes them has the state ``damaged``. A finished run's figures are those of its
    manifest. The loss of another run is that of the end of its metrics.jsonl.
    """
    return [_describe(path, changed) for path, changed in _runs(root)]


def run_paths(root: str | Path = "runs") -> list[Path]:
    """The runs under ``root``, newest first, with no file of them read."""
    return [path for path, _ in _runs(root)]


def _runs(root: str | Path) -> list[tuple[Path, float]]:
    """Each run with the time when its state last changed, newest first."""
    folder = Path(root)
    times: dict[Path, int] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # removed at this moment
            times |= {path: (path / "manifest.json").stat().st_mtime_ns} if is_run(path) else {}
    return [(path, times[path] / 1e9) for path in sorted(times, key=lambda path: -times[path])]


def _describe(path: Path, changed: float) -> ListedRun:
    manifest: dict[str, Any] = {}
    state: str | None = "damaged"
    figures = Figures()
    problems: list[str] = []
    evaluation = newest(path, problems, last_only=True)
    for problem in problems:
        log.warning("%s: %s", plain(path), problem)
    try:
        manifest = read_manifest(path)
        figures, state = figures_of(path, manifest), state_of(path, manifest)
    except (OSError, ValueError) as error:
        said = f"{plain(error.filename)}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        log.warning("%s", said)
    return {
        "path": str(path),
        "recipe": manifest.get("recipe"),
        "model": manifest.get("base_model"),
        "method": manifest.get("method"),
        "state": state,
        "step": figures.step,
        "steps_total": manifest.get("steps_total"),
        "loss": figures.loss,
        "best_eval_loss": figures.best,
        "best_step": figures.best_step,
        "evaluation": evaluation,
        "bytes": size_of(path),
        "changed": datetime.fromtimestamp(changed).astimezone().isoformat(timespec="seconds"),
    }


class Figures(NamedTuple):
    """How far a run is: its last step, its training loss, and its lowest held-out loss with the step."""

    step: int | None = None
    loss: float | None = None
    best: float | None = None
    best_step: int | None = None


def figures_of(path: Path, manifest: Mapping[str, Any]) -> Figures:
    """Those that the manifest of a finished run contains; else of the rows, of which few are parsed."""
    summary, metrics = manifest.get("summary") or {}, path / "metrics.jsonl"
    if manifest.get("state") == "finished" and not manifest.get("extension"):
        files.regular(metrics).stat()  # there must be one
        if type(summary.get("steps")) is int:
            return Figures(summary["steps"], number(summary.get("loss_last")), *best_of(manifest, ()))
    rows = [{key: row.get(key) for key in _HEADLINE} for row in read_rows(metrics, last_bytes=_LAST_BYTES)]
    best = best_of(manifest, read_rows(metrics, key="eval_loss"))
    return Figures(rows[-1]["step"] if rows else None, training_loss(rows), *best)


def best_of(manifest: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> tuple[float | None, int | None]:
    """The lowest held-out loss and its step: of ``rows``, or as the manifest of a finished run says."""
    held_out = [(row["eval_loss"], row["step"]) for row in rows if row.get("eval_loss") is not None and row["step"]]
    said = manifest.get("best") or {}
    if (loss := number(said.get("eval_loss"))) is not None and type(said.get("step")) is int:
        held_out.append((loss, said["step"]))
    return min(held_out, default=(None, None))


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder. Links are not followed, and what cannot be read counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))  # noqa: PTH118  (a Path for each file is slow)
            except OSError:
                continue
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def state_of(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """One of ``STATES``; ``dead``: running, as the manifest says, but its process is gone."""
    state = manifest.get("extension") or manifest.get("state")
    if state == "running" and writer_of(path) is None:
        return "dead"
    return None if state is None else str(state)
