"""A path of a run that is not there: told from a hub id before anything asks the hub."""

import os
from pathlib import Path

from tt_train.errors import ConfigError, did_you_mean
from tt_train.run.dir import is_run


def refuse_absent_run(path: Path, *, root: str | Path = "runs") -> None:
    """ConfigError if nothing is at ``path``, and it is beside runs, under ``root``, or called nearly like a run."""
    if path.exists():
        return
    has_folder = len(path.parts) > 1
    runs = _runs_in(path.parent) if has_folder else _runs_in(Path(root))
    is_beside = has_folder and (bool(runs) or path.parent == Path(root))
    if has_folder and not is_beside:
        return
    exact = [run for run in runs if Path(run).name == str(path)]
    near = f"; did you mean {exact[0]!r}?" if exact else did_you_mean(str(path), runs)
    if near or is_beside:
        raise ConfigError([f"{path}: no such run{near}; tt ls runs lists them"])


def _runs_in(folder: Path) -> list[str]:
    return sorted(os.path.relpath(entry) for entry in folder.iterdir() if is_run(entry)) if folder.is_dir() else []
