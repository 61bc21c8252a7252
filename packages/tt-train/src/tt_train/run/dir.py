"""The run directory: what a run leaves behind, and how it is found again. See docs/run-directory.md."""

import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from tt_ckpt import commit, files
from tt_ckpt.redaction import redact, redact_data
from tt_train.errors import ConfigError, Interrupted, counted, did_you_mean, log_name
from tt_train.records.cut import as_lines, rows_until
from tt_train.records.problems import Problems
from tt_train.records.run_files import FinishedRun, is_run, naming, own_folder, read_manifest, read_rows
from tt_train.records.visible import visible
from tt_train.run.listing import run_paths
from tt_train.run.lock import LOCK, RunLock

log = logging.getLogger("tt_train")


class RunDir:
    """A run directory; every file in it is written through here, with secrets blanked.

    One process writes to it at a time: making a RunDir takes its lock, and raises ConfigError if another one holds it.
    As a context manager it keeps train.log: progress, and the traceback of what ended the run. Of several ranks, rank 0
    writes; what another one writes is dropped, except for its own log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        from tt_train.devices.distributed import world  # loads torch, which finding a run does not need

        self.rank = world().rank
        path.mkdir(parents=True, exist_ok=True)
        self._handler: logging.Handler | None = None
        self._began = False  # whether this process has changed the run's state
        for name in ("metrics.jsonl", "samples.jsonl"):  # of a run that continues: they are cut and added to
            if os.path.lexists(path / name):
                files.regular(path / name)
        self._lock = RunLock(path)
        if self.rank == 0:
            self._lock.acquire()

    def check_shared(self) -> None:
        """ConfigError if this rank does not see what rank 0 writes."""
        if self.rank and not (self.path / LOCK).exists():
            here = f"{self.path.absolute()} on {socket.gethostname()}"
            raise ConfigError(
                [f"output_dir: {here} is not the folder of rank 0; choose an -o that every machine shares"]
            )

    def close(self) -> None:
        """Let others write to the directory."""
        self._lock.release()

    @property
    def checkpoints(self) -> Path:
        return own_folder(self.path, "checkpoints")

    def write_text(self, name: str, text: str) -> None:
        """Replace a file as a whole: a reader sees the old one or the new one, also after a loss of power."""
        self._replace(name, redact(text))

    def _replace(self, name: str, text: str) -> None:
        if self.rank:
            return
        with naming(self.path / name):
            files.replace_text(self.path / name, text)

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        """Add lines of JSON and hand them to the operating system."""
        if self.rank:
            return
        with naming(self.path / name):
            files.append_text(self.path / name, as_lines(rows))

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A path for a new folder; at the end of the block it takes the place of the folder ``name``, as a whole.

        For rank 0 only.
        """
        assert self.rank == 0
        mark = f"{files.TMP_PREFIX}{name}-"
        for leftover in self.path.glob(f"{mark}*"):  # of a run that was killed
            commit.remove_tree(leftover)
        part, old = (self.path / f"{mark}{secrets.token_hex(8)}" for _ in range(2))
        place = self.path / name
        try:
            yield part
            if os.path.lexists(place):
                place.rename(old)
            part.rename(place)
        finally:
            if os.path.lexists(old) and not os.path.lexists(place):
                old.rename(place)
            for leftover in (part, old):
                commit.remove_tree(leftover)

    def rows(self, name: str, *, key: str | int | None = None) -> Iterator[dict[str, Any]]:
        """The rows of a ``.jsonl`` file; a broken last line (the run was killed while writing it) is left out.

        key: see ``read_rows``.
        """
        return read_rows(self.path / name, key=key)

    def keep_until(self, step: int) -> None:
        """Drop metrics and samples of steps after ``step``: the run resumes there and writes them again."""
        for name, problems in self.take_rows(self.path, step).items():
            if problems:
                places = counted(problems.total, "place")
                log.warning("%s: not as a run writes it in %s, first %s", name, places, problems[0])

    def take_rows(self, run: Path, step: int) -> dict[str, Problems]:
        """Put the metrics and samples of ``run`` up to ``step`` in place of this run's. What was wrong in each file."""
        problems: dict[str, Problems] = {}
        for name in ("metrics.jsonl", "samples.jsonl") if self.rank == 0 else ():
            if os.path.lexists(run / name):
                problems[name] = Problems()
                with naming(self.path / name), files.replacing(self.path / name) as file:
                    for piece in rows_until(run / name, step, problems[name]):
                        file.write(piece)
        return problems

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace a file by ``value`` as JSON."""
        self._replace(name, json.dumps(redact_data(value), indent=2, ensure_ascii=False) + "\n")

    def update_manifest(self, **changes: Any) -> None:
        """Set keys of manifest.json."""
        if self.rank:
            return
        self.write_json("manifest.json", read_manifest(self.path) | changes)

    def set_state(self, state: str) -> None:
        """``running``, ``stopped`` or ``failed``. A finished run stays finished; its ``extension`` has a state."""
        if self.rank:
            return
        finished = read_manifest(self.path).get("state") == "finished"
        self.update_manifest(**{"extension" if finished else "state": state})
        self._began = True

    def finished(self, **results: Any) -> None:
        """The results are on the disk."""
        self.update_manifest(state="finished", extension=None, **results)

    def __enter__(self) -> "RunDir":
        try:
            log_file = self.path / log_name(self.rank)
            log_file.parent.mkdir(exist_ok=True)
            self._handler = _LogFile(log_file, encoding="utf-8")
        except (OSError, ValueError):
            self.close()
            raise
        self._handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.setLevel(logging.INFO)
        log.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._note_end(error)
        except OSError as problem:  # a full disk, most likely also what ended the run: that error comes first
            if error is None:
                raise
            error.add_note(f"and its end could not be recorded: {problem}")
        finally:
            if self._handler is not None:
                log.removeHandler(self._handler)
                self._handler.close()
            self.close()

    def _note_end(self, error: BaseException) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        if self._began:  # else whatever state the run had before is still true
            self.set_state("stopped" if stopped else "failed")
        if isinstance(error, Interrupted):
            log.info("%s", error)
        else:
            log.error("the run ended", exc_info=error)


class _LogFile(logging.FileHandler):
    """train.log, whose failure is an error and no trace on stderr."""

    def _open(self) -> TextIOWrapper:
        return cast(TextIOWrapper, files.appending(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            with naming(Path(self.baseFilename)):
                raise error
        super().handleError(record)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(redact(super().format(record)))


def find_run(path: str | Path | None = None, *, root: str | Path = "runs") -> Path:
    """The run at ``path``, or the newest one under ``root``; ConfigError with a cure where there is none."""
    if path is None:
        runs = run_paths(root)
        if not runs:
            raise ConfigError([f"no run found under {Path(root).absolute()}; name one, or start with: tt run sft ..."])
        return runs[0]
    folder = Path(path)
    if is_run(folder):
        return folder
    if not folder.exists():
        known = [os.path.relpath(run) for run in run_paths(root)]
        raise ConfigError([f"{path}: no such run{did_you_mean(str(path), known)}; tt ls runs lists them"])
    holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) if folder.is_dir() else "a file"
    raise ConfigError(
        [
            f"{path}: not a run directory (no config.yaml and manifest.json; found: {holds or 'nothing'}); "
            "tt ls runs lists them"
        ]
    )


def results_of(path: Path) -> Path:
    """What a run has trained, as a folder for others: its adapter or its model. Any other folder is itself."""
    run = FinishedRun.at(path)
    if run is None:
        return path
    if (result := run.adapter or run.model) is not None:
        return result
    saved = any((path / "checkpoints").glob("step-*"))
    cure = "continue it with --resume auto" if saved else "nor a checkpoint to continue from; start a new run"
    raise ConfigError([f"{path}: the run has no results yet{';' if saved else ','} {cure}"])
