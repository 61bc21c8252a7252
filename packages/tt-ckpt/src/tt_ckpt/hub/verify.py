"""Whether the files of a directory are what they were when they came: by the hashes that came with them.

A flipped bit leaves a file's size and header as they were; only a hash tells. The hub's cache names files by theirs, a
download into a directory keeps them beside it, and a training checkpoint has a manifest.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tt_ckpt import commit
from tt_ckpt.files import read_text, regular
from tt_ckpt.hf.directory import resolve
from tt_ckpt.shown import plain


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What ``verify_files`` found to be whole, and what has no hash to compare with. Plain data."""

    path: str
    files: list[str]
    without_hash: list[str]


def verify_files(path: str | Path) -> Verified:
    """Compare the files of a model directory, hub id or training checkpoint with their hashes.

    A file that differs is a ValueError that names it. Files of unknown origin are listed in ``without_hash``.
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
    """sha256 (64 digits) or git's sha1 (40) as the hub stated it."""
    if file.is_symlink():  # the cache: a link to blobs/<hash>
        stated = file.readlink().name
    else:
        lines = _recorded(directory, name)
        stated = lines[1].strip() if len(lines) > 1 else ""
    return stated if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", stated) else None


def was_fetched(directory: Path, name: str) -> bool:
    """Whether a download put this file into ``directory`` and nobody has written to it since."""
    try:
        return (directory / name).stat().st_mtime - 1 <= float(_recorded(directory, name)[2])
    except (OSError, ValueError, IndexError):
        return False


def _recorded(directory: Path, name: str) -> list[str]:
    """The lines (commit, hash and time) that huggingface_hub keeps of a file that it put into a directory."""
    try:
        text = read_text(directory / ".cache/huggingface/download" / f"{name}.metadata", directory, limit=10_000)
    except (OSError, ValueError):
        return []
    return text.splitlines()


def content_hash(file: Path, like: str) -> str:
    """sha256 of the file, or git's sha1 of it where ``like`` is as short as one."""
    if len(like) == 64:
        return commit.sha256_of(file)
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
