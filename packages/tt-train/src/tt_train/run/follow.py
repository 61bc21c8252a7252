"""What a run has written since the last look: a live run seen from another process. Loads no torch."""

import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tt_ckpt import files
from tt_train.records.run_files import LAST_STEP, is_plain, number, read_manifest, read_rows
from tt_train.run.listing import best_of, state_of

_PIECE_BYTES = 4_000_000  # of lines that are in memory at a time
_LOG_BYTES = 20_000


@dataclass
class Follower:
    """The rows of a run's metrics.jsonl, read a piece at a time.

    ``rows``: those that count now, by step, each with its loss, and with all figures if it was evaluated. ``last``: the
    newest with all figures. When a run resumes, it takes back the rows after its checkpoint. ``past``: how many of the
    rows that were there before the first look it gives.
    """

    path: Path
    past: int | None = None
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    _file: int = 0  # inode of the file that was read
    _read: int = 0  # bytes of it

    def look(self) -> "Look":
        """Read what is new. OSError or ValueError if the run is gone or its files are not as a run writes them."""
        self.manifest = read_manifest(self.path)
        self.state = state_of(self.path, self.manifest)
        file, before = self.path / "metrics.jsonl", set[int]()
        if not os.path.lexists(file):
            return Look()
        with files.regular(file).open("rb") as opened:
            found = os.fstat(opened.fileno())
            replaced = found.st_ino != self._file or found.st_size < self._read
            new: deque[dict[str, Any]] = deque(maxlen=None if self._file else self.past)
            if replaced:
                before = set(self.rows)
                self._file, self._read, self.rows, self.last = found.st_ino, 0, {}, {}
            opened.seek(self._read)
            for line in self._lines(opened):
                if (row := _row(line)) is not None:
                    few = {"step": row["step"], "loss": row.get("loss")}
                    self.rows[row["step"]] = row if "eval_loss" in row else few
                    self.last = row
                    if row["step"] not in before:
                        new.append(row)
        gone = before - set(self.rows) if before else ()
        return Look(new=list(new), resumed_after=max(before & set(self.rows), default=0) if gone else None)

    def _lines(self, opened: BinaryIO) -> Iterator[bytes]:
        """The whole lines from here on; the rest is a line that is being written."""
        while whole := (text := opened.read(_PIECE_BYTES)).rfind(b"\n") + 1:
            self._read += whole
            opened.seek(self._read)
            yield from text[:whole].splitlines()

    def last_words(self) -> str | None:
        """The line of train.log that ends the traceback of a run that failed; None if there is none."""
        try:
            with files.regular(self.path / "train.log").open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_BYTES))
                lines = log.read(_LOG_BYTES).decode("utf-8", "replace").splitlines()
        except (OSError, ValueError):
            return None
        starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
        after = [line for line in lines[starts[-1] + 1 :] if line and not line[0].isspace()] if starts else []
        return after[0] if after else None


@dataclass(frozen=True, kw_only=True)
class Look:
    """``new``: rows since the last look. ``resumed_after``: the step after which the run has taken rows back."""

    new: list[dict[str, Any]] = field(default_factory=list)
    resumed_after: int | None = None


def place(path: Path) -> dict[str, Any]:
    """Where a run is now, for ``tt watch --json``, from the end of metrics.jsonl and the rows of evaluations."""
    manifest, metrics = read_manifest(path), path / "metrics.jsonl"
    *_, last = [{}, *read_rows(metrics, last_bytes=_PIECE_BYTES // 40)]
    best, best_step = best_of(manifest, read_rows(metrics, key="eval_loss"))
    return {
        "run": str(path), "state": state_of(path, manifest), "step": last.get("step"),
        "steps_total": manifest.get("steps_total"), "eta_s": last.get("eta_s"),
        "best_eval_loss": best, "best_step": best_step, "figures": _figures(last),
    }  # fmt: skip


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key == "step" else number(value) for key, value in row.items() if not isinstance(value, str)}


def _row(line: bytes) -> dict[str, Any] | None:
    """The numbers of a row, None for one that is not finite; None for a line that is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not is_plain(row) or type(row.get("step")) is not int:
        return None
    if not 0 <= row["step"] < LAST_STEP:
        return None
    return _figures(row)
