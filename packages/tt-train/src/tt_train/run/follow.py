"""What a run has written since the last look: a live run seen from another process. Loads no torch."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_ckpt import files
from tt_train.records.run_files import LAST_STEP, is_plain, number, read_manifest
from tt_train.run.listing import state_of

_LOOK_BYTES = 64_000_000  # of new lines at a time
_LOG_BYTES = 20_000


@dataclass
class Follower:
    """The rows of a run's metrics.jsonl, read a piece at a time.

    ``rows``: those that count now, by step. When a run resumes, it takes back the rows after its checkpoint.
    """

    path: Path
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    _file: int = 0  # inode of the file that was read
    _read: int = 0  # bytes of it

    def look(self) -> "Look":
        """Read what is new. OSError or ValueError if the run is gone or its files are not as a run writes them."""
        self.manifest = read_manifest(self.path)
        self.state = state_of(self.path, self.manifest)
        file, before = self.path / "metrics.jsonl", set(self.rows)
        if not os.path.lexists(file):
            return Look()
        with files.regular(file).open("rb") as opened:
            found = os.fstat(opened.fileno())
            replaced = found.st_ino != self._file or found.st_size < self._read
            if replaced:
                self._file, self._read, self.rows = found.st_ino, 0, {}
            opened.seek(self._read)
            text = opened.read(_LOOK_BYTES)
        whole = text.rfind(b"\n") + 1  # the rest is a line that is being written
        self._read += whole
        rows = [row for line in text[:whole].splitlines() if (row := _row(line)) is not None]
        self.rows |= {row["step"]: row for row in rows}
        new = [row for row in rows if row["step"] not in before or not replaced]
        return Look(new=new, resumed_after=max(before & set(self.rows), default=0) if before - set(self.rows) else None)

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
    figures = {key: number(value) for key, value in row.items() if not isinstance(value, str)}
    return {**figures, "step": row["step"]}
