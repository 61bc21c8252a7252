"""Free the space of a run's checkpoints: they are for resuming, and the largest files of a run. Loads no torch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tt_ckpt import files
from tt_ckpt.redaction import redact, redact_data
from tt_ckpt.train import run_folder
from tt_train.errors import ConfigError, counted
from tt_train.records.run_files import FinishedRun, read_rows
from tt_train.run.listing import best_of, size_of, state_of
from tt_train.run.lock import RunLock, writer_of


@dataclass(frozen=True, kw_only=True)
class Freed:
    """The result of ``remove_checkpoints``, or of its ``dry_run``. Names are those of folders in ``checkpoints/``."""

    run: str
    removed: dict[str, int]  # name: bytes
    kept: dict[str, int]
    bytes: int
    dry_run: bool


def remove_checkpoints(
    run: FinishedRun, *, keep_last: int = 0, keep_best: bool = False, dry_run: bool = False
) -> Freed:
    """Remove the checkpoints of a run, except the newest ``keep_last`` whole ones and, if asked, that of the best step.

    Its result, figures and report stay. A checkpoint loses its name before its files, so that an interrupted removal
    leaves no half one.

    Raises:
        ConfigError: a process writes to the run; the run has no result and would lose its last checkpoint;
            ``keep_best`` of a run that has no checkpoint of its best step.
        OSError: a checkpoint could not be removed.
    """
    folder, lock = run.checkpoints, RunLock(run.path)
    if (writer := writer_of(run.path)) is not None:
        raise ConfigError([f"{run.path} is being written by process {writer.get('pid')}; wait for its end, or stop it"])
    if not dry_run:
        lock.acquire()
    try:
        kept_names = {_best_checkpoint(run)} if keep_best else set()
        unneeded = run_folder.superseded(folder, keep_last, kept_names)
        kept = [path for path in run_folder.candidates(folder) if path not in unneeded]
        _refuse_last_state(run, unneeded, kept)
        removed = {path.name: size_of(path) for path in unneeded}
        for path in () if dry_run else unneeded:
            run_folder.remove(path)
            if os.path.lexists(path):
                raise PermissionError(f"{path} cannot be removed; check the permissions of {folder}")
        if not dry_run:
            run_folder.remove_leftovers(folder)
            _forget_best(run)
    finally:
        lock.release()
    sizes = {path.name: size_of(path) for path in kept}
    return Freed(run=str(run.path), removed=removed, kept=sizes, bytes=sum(removed.values()), dry_run=dry_run)


def _best_checkpoint(run: FinishedRun) -> str:
    step = best_of(run.manifest, read_rows(run.path / "metrics.jsonl", key="eval_loss"))[1]
    if step is None:
        raise ConfigError([f"--keep-best: {run.path} has no held-out loss, so no step is the best; use --keep-last N"])
    name = run_folder.name_of(step)
    if not (run.checkpoints / name).is_dir():
        raise ConfigError([f"--keep-best: {run.path} has no checkpoint of its best step, {step}; use --keep-last N"])
    return name


def _refuse_last_state(run: FinishedRun, unneeded: list[Path], kept: list[Path]) -> None:
    """Unless a run is finished and its result is there, its newest checkpoint is all that its training gave."""
    state = state_of(run.path, run.manifest)
    has_result = state == "finished" and (run.adapter or run.model) is not None
    if unneeded and not kept and not has_result:
        what = "has no result" if state == "finished" else f"is {state or 'not finished'}"
        lost = counted(int(run_folder.step_of(unneeded[-1])), "step")
        cure = "keep it with --keep-last 1; to give the run up, remove its whole directory"
        raise ConfigError([f"{run.path} {what}: its newest checkpoint is all that is left of {lost}; {cure}"])


def _forget_best(run: FinishedRun) -> None:
    """The manifest of a finished run names the checkpoint of its best step: no longer, if that is gone.

    The file keeps its time, by which the newest run is found.
    """
    best, file = run.manifest.get("best") or {}, run.path / "manifest.json"
    named = best.get("checkpoint")
    if isinstance(named, str) and not (run.path / named).is_dir():
        changed = redact_data({**run.manifest, "best": {**best, "checkpoint": None}})
        before = file.stat()
        files.replace_text(file, redact(json.dumps(changed, indent=2, ensure_ascii=False) + "\n"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
