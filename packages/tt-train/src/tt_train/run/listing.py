"""The runs of a folder in figures, for ``tt ls runs``. Read from their files, without torch."""

import logging
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from tt_ckpt.shown import plain
from tt_train.records.run_files import is_run, number, read_manifest, read_rows
from tt_train.report.summary import training_loss
from tt_train.run.lock import writer_of

log = logging.getLogger("tt_train")

STATES = ("running", "stopped", "failed", "dead", "finished", "damaged")
_HEADLINE = ("step", "epoch", "loss", "tokens", "eval_loss")
_LAST_BYTES = 8_000_000  # of metrics.jsonl, for the last step and the losses of a run that is not finished


class ListedRun(TypedDict):
    """A row of ``tt ls runs``; None if the run does not say. ``loss``: see ``training_loss``.

    ``best_eval_loss``: the lowest held-out loss after step 0, at ``best_step``. ``bytes``: of all files of the run.
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
    bytes: int
    changed: str


def list_runs(root: str | Path = "runs") -> list[ListedRun]:
    """The runs under ``root``, newest first: path, state, model, last step, losses and size.

    A run whose files are not as a run writes them has the state ``damaged``.
    """
    folder = Path(root)
    times: dict[Path, int] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # removed at this moment
            times |= {path: (path / "manifest.json").stat().st_mtime_ns} if is_run(path) else {}
    return [_describe(path, times[path] / 1e9) for path in sorted(times, key=lambda path: -times[path])]


def _describe(path: Path, changed: float) -> ListedRun:
    manifest: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    loss, best, best_step = None, None, None
    try:
        manifest = read_manifest(path)
        state = state_of(path, manifest)
        rows = [
            {key: row.get(key) for key in _HEADLINE}
            for row in read_rows(path / "metrics.jsonl", last_bytes=_LAST_BYTES)
        ]
        loss, (best, best_step) = training_loss(rows), best_of(manifest, rows)
        if state == "finished" and (path / "metrics.jsonl").stat().st_size > _LAST_BYTES:
            loss = number((manifest.get("summary") or {}).get("loss_last"))  # over all rows that count
    except (OSError, ValueError) as error:
        said = f"{plain(error.filename)}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        log.warning("%s", said)
        state = "damaged"
    return {
        "path": str(path),
        "recipe": manifest.get("recipe"),
        "model": manifest.get("base_model"),
        "method": manifest.get("method"),
        "state": state,
        "step": rows[-1].get("step") if rows else None,
        "steps_total": manifest.get("steps_total"),
        "loss": loss,
        "best_eval_loss": best,
        "best_step": best_step,
        "bytes": size_of(path),
        "changed": datetime.fromtimestamp(changed).astimezone().isoformat(timespec="seconds"),
    }


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
