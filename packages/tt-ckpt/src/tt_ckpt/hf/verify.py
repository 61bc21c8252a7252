"""Whether the files of a directory are unchanged since they were downloaded or saved, by their hashes.

A flipped bit changes neither the size nor the header of a file; only a hash shows it. The hub's cache names files by
their hashes, a download into a directory notes them beside it, and a training checkpoint has a manifest.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tt_ckpt import commit
from tt_ckpt.files import regular
from tt_ckpt.hub.download import content_hash, recorded
from tt_ckpt.model_path import resolve
from tt_ckpt.shown import plain


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The files that ``verify_files`` found unchanged, and those without a known hash. Plain data."""

    path: str
    files: list[str]
    without_hash: list[str]


def verify_files(path: str | Path) -> Verified:
    """Compare the files of a model directory, hub id or training checkpoint with their hashes.

    A file that differs is a ValueError that names it. Files without a known hash are listed in ``without_hash``.
    """
    directory = resolve(path)
    if (directory / commit.MANIFEST_NAME).is_file():
        names = sorted(commit.verify(directory)["files"])
        return Verified(path=str(directory), files=names, without_hash=[])
    files, unknown = [], []
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if file.is_dir() or name.startswith("."):
            continue
        regular(file, directory)
        expected = _expected_hash(directory, file, name)
        if expected is None:
            unknown.append(name)
        elif content_hash(file, expected) != expected:
            what = "contents changed since the download (its hash differs)"
            raise ValueError(f"{plain(file)}: {what}; run tt download again")
        else:
            files.append(name)
    return Verified(path=str(directory), files=files, without_hash=unknown)


def _expected_hash(directory: Path, file: Path, name: str) -> str | None:
    """The sha256 (64 digits) or git's sha1 (40) that the hub stated."""
    if file.is_symlink():  # the cache: a link to blobs/<hash>
        stated = file.readlink().name
    else:
        lines = recorded(directory, name)
        stated = lines[1].strip() if len(lines) > 1 else ""
    return stated if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", stated) else None
