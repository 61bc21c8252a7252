"""The folder with a run's checkpoints: which there are, giving a new one its name, removing old ones."""

import os
import platform
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tt_ckpt import commit
from tt_ckpt.files import TMP_PREFIX
from tt_ckpt.shown import format_size, plain, quoted

FORMAT_VERSION = 1
_ASIDE = ".old-"
_CURE = "use an older checkpoint"
_NAME = re.compile(r"(\.old-)?step-(\d{6,})(-[0-9a-f]{8})?")


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, "a candidate"
    return int(match[2])


def candidates(directory: Path) -> list[Path]:
    """The checkpoints, oldest first. One that an unfinished replacement set aside counts; a link does not."""
    found = []
    for entry in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir() and not entry.is_symlink() and bool(match[1]) == bool(match[3]):
            found.append((int(match[2]), match[1] is None, entry))
    return [entry for _, _, entry in sorted(found)]


def describe(directory: Path) -> str:
    names = [path.name for path in candidates(directory)]
    return f"{directory} holds {', '.join(names) or 'none'}"


def links(directory: Path) -> list[Path]:
    """Links with the name of a checkpoint, which are neither read nor removed."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(entry for entry in found if entry.is_symlink() and _NAME.fullmatch(entry.name))


def manifest_facts(step: int, world_size: int) -> dict[str, Any]:
    """The keys that every manifest has, beside those of its files and groups."""
    import torch  # which looking at a folder does not need

    return {
        "format": "tt-ckpt training checkpoint",
        "version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "tt_ckpt": version("tt-ckpt")},
    }


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """ValueError unless the manifest has a format that is read here, names of groups, and the step of its folder."""
    if manifest.get("version") != FORMAT_VERSION:
        versions = manifest.get("versions")
        wrote = versions.get("tt_ckpt") if isinstance(versions, dict) else None
        found = f"format version {quoted(manifest.get('version'))}, this tt_ckpt reads {FORMAT_VERSION}"
        raise ValueError(f"{path}: {found}; use tt-ckpt {plain(wrote) if wrote else 'of that time'}")
    groups, step, where = manifest.get("groups"), manifest.get("step"), path / commit.MANIFEST_NAME
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise ValueError(f"{where}: damaged: groups: expected a list of names, found {quoted(groups)}; {_CURE}")
    if type(step) is not int or not 0 <= step < 1 << 60:
        raise ValueError(f"{where}: damaged: step: expected a whole number, found {quoted(step)}; {_CURE}")
    if _NAME.fullmatch(path.name) and step_of(path) != step:
        raise ValueError(f"{where}: of step {step}, not of {path.name}; give the folder its own name, or {_CURE}")


def publish(tmp: Path, destination: Path) -> None:
    """Give a finished folder its name. A checkpoint of the same step is set aside first, never overwritten."""
    aside = None
    if os.path.lexists(destination):
        aside = destination.parent / f"{_ASIDE}{destination.name}-{secrets.token_hex(4)}"
        destination.rename(aside)
    tmp.rename(destination)
    commit.fsync_dir(destination.parent)
    if aside is not None:
        commit.remove_tree(aside)


def remove_leftovers(directory: Path) -> None:
    """Remove the folders that killed saves have left."""
    for entry in directory.glob(f"{TMP_PREFIX}step-*"):
        commit.remove_tree(entry)
    for entry in directory.glob(f"{_ASIDE}step-*"):
        if (directory / entry.name.removeprefix(_ASIDE).rpartition("-")[0]).exists():
            commit.remove_tree(entry)


def prune(directory: Path, keep_last: int, kept_names: Collection[str]) -> None:
    """Remove the checkpoints that ``superseded`` names."""
    for path in superseded(directory, keep_last, kept_names):
        remove(path)


def superseded(directory: Path, keep_last: int, kept_names: Collection[str]) -> list[Path]:
    """The checkpoints older than the newest ``keep_last`` whole ones; a damaged one does not count.

    ``kept_names`` are never among them. The one just saved is a kept name: after a return to an older step it may have
    the lowest number.
    """
    found, kept = candidates(directory), 0
    while found and kept < keep_last:
        try:
            commit.verify(found.pop(), hashes=False)
        except (OSError, ValueError):
            continue
        kept += 1
    return [path for path in found if path.name not in kept_names]


def remove(path: Path) -> None:
    """Remove a checkpoint. Its name goes first, so that an interrupted removal leaves no half checkpoint."""
    gone = path.parent / f"{TMP_PREFIX}{path.name}-{secrets.token_hex(4)}"
    try:
        path.rename(gone)
    except OSError:
        return  # the old one stays, and the new one is saved
    commit.remove_tree(gone)


def preflight(directory: Path, nbytes: int, copies: int, besides: int) -> None:
    """OSError unless files can be written and read back here, and there is room for ``copies`` checkpoints.

    1.2 times ``copies * nbytes + besides`` must be free. Existing checkpoints count as copies.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probe = commit.make_tmp(directory / "step-probe")
    try:
        commit.write_bytes(probe / "probe", b"probe")
        if (probe / "probe").read_bytes() != b"probe":
            raise OSError(f"{directory}: a file that is written there cannot be read back")
    finally:
        commit.remove_tree(probe)
    missing = max(0, copies - len(candidates(directory)))
    free, needed = shutil.disk_usage(directory).free, int(1.2 * (missing * nbytes + besides))
    if free < needed:
        what = f"{missing} checkpoint{'s' if missing != 1 else ''}{' and the result' if besides else ''}"
        sizes = f"{format_size(free)} free, {what} need {format_size(needed)}"
        raise OSError(f"{directory}: {sizes}; free some or choose another output directory")
