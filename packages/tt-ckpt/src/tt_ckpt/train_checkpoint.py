"""Training state on disk: saved whole or not at all, verified when read, never the only copy.

A checkpoint is a folder ``step-000200`` with a safetensors file per group of tensors, ``state.json``, whatever
files the caller adds, and a manifest. There is no pickle in it.
"""

import json
import logging
import platform
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt import commit
from tt_ckpt.names import check_basename
from tt_ckpt.tensor_file import MappedFile, write_tensor_dict

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATE_NAME = "state.json"
_OLD_PREFIX = ".old-"


class CheckpointNotSaved(RuntimeError):  # noqa: N818  (the name says what happened)
    """A save failed; what was there before is untouched. ``__cause__`` is the reason."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What ``restore`` gives. Tensors are views of a memory map: copy them where they are to live."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    manifest: dict[str, Any]


class TrainCheckpoint:
    """The checkpoints of one run, in ``directory``. The newest ``keep_last`` (at least 2) are kept."""

    def __init__(self, directory: str | Path, *, keep_last: int = 2) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, so that a damaged newest has a fall-back; got {keep_last}")
        self.directory = Path(directory)
        self.keep_last = keep_last

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        files: Mapping[str, Callable[[Path], None]] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint and return its folder once it is on the disk under its final name.

        ``tensors``: group -> named tensors, one safetensors file each. ``state``: anything JSON. ``files``: name ->
        function that writes that file or folder. ``info``: further keys of the manifest (config hash, base model).
        Raises CheckpointNotSaved, with everything cleaned up and older checkpoints as they were.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        for name in (*tensors, *(files or {})):
            check_basename(name, where="TrainCheckpoint.save")
        destination = self.directory / f"step-{step:06d}"
        tmp = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            tmp = commit.make_tmp(destination)
            hashes = _write(tmp, step, tensors, state, files or {})
            commit.fsync_tree(tmp)
            commit.write_manifest(tmp, {**(info or {}), **_facts(step), "groups": sorted(tensors)}, hashes)
            commit.fsync_dir(tmp)
            self._publish(tmp, destination)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            if tmp is not None:
                commit.remove_tree(tmp)
            raise CheckpointNotSaved(f"{destination}: not saved: {error}") from error
        self._prune(destination)
        return destination

    def latest(self, *, hashes: bool = True) -> Path | None:
        """The newest checkpoint that is whole, or None. A damaged one is skipped with a warning that names the file.

        ``hashes=False`` compares sizes only: for checkpoints so large that reading them twice hurts.
        """
        for path in reversed(self._candidates()):
            try:
                commit.verify(path, hashes=hashes)
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s cannot be used, falling back to an older one: %s", path.name, error)
                continue
            return path
        return None

    def restore(self, path: str | Path | None = None, *, hashes: bool = True) -> TrainState:
        """Read a checkpoint: ``path``, which must be whole, or the newest whole one."""
        if path is None:
            found = self.latest(hashes=hashes)
            if found is None:
                raise FileNotFoundError(f"{self.directory}: no usable checkpoint; start the run anew")
            manifest = commit.read_manifest(found)
        else:
            found = Path(path)
            if not found.is_dir():
                raise FileNotFoundError(f"{found}: no such checkpoint{self._present()}")
            manifest = commit.verify(found, hashes=hashes)
        if manifest.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{found}: format version {manifest.get('version')!r}, this tt_ckpt reads {FORMAT_VERSION}; "
                f"use tt-ckpt {manifest.get('versions', {}).get('tt_ckpt', 'of the time')}"
            )
        groups = {}
        for group in manifest["groups"]:
            with MappedFile(found / f"{check_basename(group, where=found)}.safetensors") as file:
                groups[group] = {name: file.tensor(name) for name in file.header.tensors}
        state = json.loads((found / STATE_NAME).read_bytes())
        return TrainState(step=manifest["step"], tensors=groups, state=state, path=found, manifest=manifest)

    # ---- the folder ------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Path]:
        """Oldest first. A folder set aside by a replacement that did not finish counts as a checkpoint."""
        found = []
        for entry in self.directory.iterdir() if self.directory.is_dir() else ():
            match = re.fullmatch(r"(\.old-)?step-(\d{6,})(-[0-9a-f]{8})?", entry.name)
            if match and entry.is_dir() and bool(match[1]) == bool(match[3]):
                found.append((int(match[2]), match[1] is None, entry))
        return [entry for _, _, entry in sorted(found)]

    def _present(self) -> str:
        names = [path.name for path in self._candidates()]
        return f"; {self.directory} holds {', '.join(names)}" if names else f"; {self.directory} holds none"

    def _publish(self, tmp: Path, destination: Path) -> None:
        aside = None
        if destination.exists():  # the same step again, after a fall-back: set aside, never written over
            aside = destination.parent / f"{_OLD_PREFIX}{destination.name}-{secrets.token_hex(4)}"
            destination.rename(aside)
        tmp.rename(destination)
        commit.fsync_dir(self.directory)
        if aside is not None:
            commit.remove_tree(aside)

    def _remove_leftovers(self) -> None:
        """What saves that were killed have left behind."""
        for entry in self.directory.glob(f"{commit.TMP_PREFIX}step-*"):
            commit.remove_tree(entry)
        for entry in self.directory.glob(f"{_OLD_PREFIX}step-*"):
            if (self.directory / entry.name.removeprefix(_OLD_PREFIX).rpartition("-")[0]).exists():
                commit.remove_tree(entry)

    def _prune(self, newest: Path) -> None:
        """Remove all but the newest whole checkpoints. A damaged one does not count as kept; failing is no failure."""
        whole = []
        for path in reversed(self._candidates()):
            try:
                commit.verify(path, hashes=False)
            except (OSError, ValueError):
                continue
            whole.append(path)
        for path in whole[self.keep_last :]:
            if path != newest:
                commit.remove_tree(path)


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, Callable[[Path], None]],
) -> dict[str, str]:
    """Everything but the manifest; returns the hashes that fell off while writing."""
    hashes = {}
    for group, named in tensors.items():
        name = f"{group}.safetensors"
        digest = write_tensor_dict(folder / name, named, hashed=True)
        assert digest is not None
        hashes[name] = digest
    commit.write_json(folder / STATE_NAME, dict(state))
    for name, write in files.items():
        write(folder / name)
    return hashes


def _facts(step: int) -> dict[str, Any]:
    return {
        "format": "tt-ckpt training checkpoint",
        "version": FORMAT_VERSION,
        "step": step,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "tt_ckpt": version("tt-ckpt")},
    }
