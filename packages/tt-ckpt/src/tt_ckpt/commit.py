"""Files and folders that are whole or absent: written under another name, synced, listed in a manifest, renamed.

A folder is prepared under a temporary name (``.tmp-...``), so a crash at any moment leaves either the old state or the
new one. The manifest lists the size and sha256 of every other file, and a sha256 of itself.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tt_ckpt.files import TMP_PREFIX, create, read_bytes, regular, sync
from tt_ckpt.safe_names import check_basename
from tt_ckpt.shown import plain, quoted

MANIFEST_NAME = "MANIFEST.json"
_CURE = "use an older checkpoint"


def write_bytes(path: Path, data: bytes) -> None:
    """A new file with these bytes, on the disk when this returns."""
    with create(path) as file:
        file.write(data)
        sync(file)


def encode_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, encode_json(value))


def fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Sync every file below ``path``, then every folder, deepest first; also those that others have written."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_dir(Path(folder))


def make_tmp(destination: Path) -> Path:
    """An empty folder beside ``destination``, to be renamed to it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    tmp = destination.parent / f"{TMP_PREFIX}{destination.name}-{secrets.token_hex(4)}"
    tmp.mkdir(mode=0o755)
    return tmp


def remove_tree(path: Path) -> None:
    """Remove a folder or file, whatever state it is in."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the manifest --------------------------------------------------------------------------------------------------


def list_files(directory: Path) -> list[str]:
    """The relative names, with forward slashes, of all files below ``directory`` except the manifest."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != MANIFEST_NAME)


def write_manifest(directory: Path, info: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Write MANIFEST.json for all files of ``directory``. ``known`` has sha256 sums that need not be computed."""
    known = known or {}
    files = {}
    if "sha256" in info:
        raise ValueError("the manifest has its own sha256: use another name")
    for name in list_files(directory):
        path = directory / name
        if path.is_symlink():  # which verify would refuse
            raise ValueError(f"{path}: a link, which cannot be part of a checkpoint; copy the file")
        files[name] = {"size": path.stat().st_size, "sha256": known.get(name) or sha256_of(path)}
    body = json.loads(json.dumps({**info, "files": files}, allow_nan=False))
    write_json(directory / MANIFEST_NAME, {**body, "sha256": _digest(body)})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest if it is whole; else a ValueError or OSError that names it."""
    path = directory / MANIFEST_NAME
    try:
        raw = read_bytes(path, directory, cure=_CURE)
        body = json.loads(raw)
        as_written = encode_json(body) == raw
        claimed = body.pop("sha256")
        entries = body["files"]
        sound = (
            as_written
            and claimed == _digest(body)
            and all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in entries.values())
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing: the save did not finish; {_CURE}") from None
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeError):
        sound = False
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged; {_CURE}")
    for name in entries:
        for part in name.split("/"):
            check_basename(part, where=path)
    result: dict[str, Any] = body
    return result


def verify(directory: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Compare every file with the manifest: sizes, and contents if ``hashes``. Returns the manifest.

    ValueError that names the first file that is missing, changed or not listed.
    """
    manifest = read_manifest(directory)
    entries = manifest["files"]
    for name in list_files(directory):
        if name not in entries:
            raise ValueError(f"{plain(directory / name)}: not in the manifest; remove it, or {_CURE}")
    for name, entry in entries.items():
        path = directory / name
        try:
            size = regular(path, directory).stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; {_CURE}") from None
        if path.is_symlink():
            raise ValueError(f"{path}: a link, which cannot be part of a checkpoint; copy the file, or {_CURE}")
        if size != entry["size"]:
            raise ValueError(f"{path}: {size} bytes, the manifest says {quoted(entry['size'])}; {_CURE}")
    if hashes:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as readers:
            sums = readers.map(sha256_of, [directory / name for name in entries])
            for (name, entry), found in zip(entries.items(), sums, strict=True):
                if found != entry["sha256"]:
                    what = "contents changed since it was written (sha256 differs)"
                    raise ValueError(f"{directory / name}: {what}; {_CURE}")
    return manifest
