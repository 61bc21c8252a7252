"""Where a new run goes, and whether it can be written there."""

import os
import re
import secrets
import time
from pathlib import Path

from tt_ckpt import files
from tt_ckpt.shown import listed, plain
from tt_train.errors import ConfigError
from tt_train.run_files import MARKER


def default_name(model: str, method: str) -> str:
    """``<time>-<model>-<method>``, safe as a folder's name."""
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", Path(model).name).strip("-.") or "model"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}-{method}"


def new_path(output_dir: str | None, model: str, method: str, *, root: Path | None = None) -> Path:
    """Where a new run goes; an ``output_dir`` that already holds something, or cannot be a path, is refused."""
    if output_dir is None:
        base = (root or Path("runs")) / default_name(model, method)
        path, number = base, 2
        while path.exists():  # two runs within a second
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
        return path
    path = Path(output_dir)
    if not str(path).isprintable():
        raise ConfigError([f"output_dir: {plain(path)} holds a character that is not printable; choose another -o"])
    try:
        there = sorted(entry.name for entry in path.iterdir()) if os.path.lexists(path) else []
    except NotADirectoryError:
        raise ConfigError([f"output_dir: {path} is not a directory; choose another -o"]) from None
    except OSError as error:
        raise ConfigError([f"output_dir: {path} cannot be used ({error.strerror}); choose another -o"]) from None
    if there:
        cure = "continue with --resume auto, or choose another -o" if MARKER in there else "choose another -o"
        raise ConfigError([f"output_dir: {path} is not empty (it holds {listed(there, 4)}); {cure}"])
    return path


def probe_writable(path: Path) -> None:
    """Find out now, not at the first checkpoint, that ``path`` cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{files.TMP_PREFIX}{secrets.token_hex(8)}"
        with files.create(probe) as file:
            file.write(b"tt")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            [f"output_dir: {path} cannot be written ({error.strerror or error}); choose another -o"]
        ) from error
