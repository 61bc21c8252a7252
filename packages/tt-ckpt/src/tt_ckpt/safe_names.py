"""File names that come out of files: each must name a file in the same folder, and nothing else."""

import os
from pathlib import Path

from tt_ckpt.files import regular
from tt_ckpt.shown import plain, quoted

_MAX_NAME = 255


def check_basename(name: object, *, where: object) -> str:
    """``name`` if it is one plain file name, else a ValueError that says where it was found."""
    bad = (
        not isinstance(name, str)
        or not name
        or name in {".", ".."}
        or any(mark in name for mark in ("/", "\\", ":"))
        or not name.isprintable()
        or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME
    )
    if bad:
        shown = f"refused the file name {quoted(name)}"
        raise ValueError(f"{plain(where)}: {shown}: not a plain name in the same folder; rename the file")
    assert isinstance(name, str)
    return name


def safe_file(directory: Path, name: object) -> Path:
    """The path of ``name`` inside ``directory``; if something is there, it must pass ``regular``."""
    path = directory / check_basename(name, where=directory)
    return regular(path, directory) if os.path.lexists(path) else path


def from_home(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; FileNotFoundError if there is no such user, or none that has a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{plain(path)}: there is no such home folder; write the path without ~") from None
