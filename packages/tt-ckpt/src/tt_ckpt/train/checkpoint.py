"""Training state on disk: saved whole or not at all, verified when read, never the only copy.

A checkpoint is a folder ``step-000200`` with safetensors files per group of tensors, ``state.json``, whatever files
the caller adds, and a manifest. There is no pickle in it. Under ``torch.distributed`` every rank makes the same calls;
each writes and reads the parts that it holds (see ``sharded``), and rank 0 does the rest.
"""

import copy
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt import commit, ranks
from tt_ckpt.files import read_json
from tt_ckpt.safe_names import check_basename
from tt_ckpt.shown import listed, plain
from tt_ckpt.train import run_folder
from tt_ckpt.train.background import Background
from tt_ckpt.train.tensor_groups import Group, Groups, copies, write_groups

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
_CURE = "use an older checkpoint"
Files = Mapping[str, Callable[[Path], None]]


class CheckpointNotSaved(RuntimeError):  # noqa: N818  (the name says what happened)
    """A save failed; what was there before is untouched. ``__cause__`` is the reason."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What ``restore`` gives. Tensors are views of a memory map, or put together when asked for: copy them."""

    step: int
    tensors: dict[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    path: Path
    manifest: dict[str, Any]


@dataclass
class _Save:
    """One checkpoint on its way."""

    step: int
    tensors: Groups
    state: Mapping[str, Any]
    info: Mapping[str, Any]
    tmp: Path
    destination: Path


class TrainCheckpoint:
    """The checkpoints of one run, in ``directory``.

    The newest ``keep_last`` (at least 2) are kept, and those of the steps in ``keep``: the best one, for example.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, so that a damaged newest has a fall-back; got {keep_last}")
        self.directory = Path(directory).expanduser()
        self.keep_last = keep_last
        self.keep: set[int] = set()
        self._background = Background()

    @cached_property
    def _ranks(self) -> ranks.Ranks:
        return ranks.current()  # collective: made by the first call that is one anyway

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        tensors: Groups,
        state: Mapping[str, Any],
        files: Files | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint and return its folder once it is on the disk under its final name.

        ``tensors``: group -> named tensors. ``state``: anything JSON (rank 0's counts). ``files``: name -> function
        that writes that file or folder (called on rank 0). ``info``: further keys of the manifest.
        On several ranks a plain tensor must be equal wherever its name is used: put the rank into the name otherwise.
        Raises CheckpointNotSaved, on every rank, with everything cleaned up and older checkpoints as they were.
        """
        self.wait()
        return self._finish(self._begin(step, tensors, state, files or {}, info or {}))

    def save_async(
        self,
        step: int,
        *,
        tensors: Groups,
        state: Mapping[str, Any],
        files: Files | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """``save``, of copies made now, in the background. A failure is raised by the next ``check``, ``wait`` or save.

        At most one is under way: a second call waits for the first.
        """
        self.wait()
        saving = self._begin(step, copies(tensors), copy.deepcopy(dict(state)), files or {}, info or {})
        self._background.start(lambda: self._finish(saving))

    def check(self) -> Path | None:
        """To be called at every step: the folder of a background save that has just finished, or its failure raised."""
        return self._background.check()

    def wait(self, timeout: float | None = None) -> Path | None:
        """Wait for the background save, at most ``timeout`` seconds (then None, and it goes on); raise its failure."""
        return self._background.wait(timeout)

    def preflight(self, nbytes: int, *, copies: int | None = None, besides: int = 0) -> None:
        """OSError unless the folder can be written and has room for ``copies`` checkpoints of ``nbytes``.

        To be called before training, not hours into it. ``copies`` is by default ``keep_last`` + 1: one is written
        before the oldest goes. Those that are there already count. ``besides``: bytes of what else is to be written on
        the disk, such as the result.
        """
        run_folder.preflight(self.directory, nbytes, self.keep_last + 1 if copies is None else copies, besides)

    def _begin(
        self, step: int, tensors: Groups, state: Mapping[str, Any], files: Files, info: Mapping[str, Any]
    ) -> _Save:
        """Check, clean up, make the folder, and write what the caller's functions write."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        for name in (*tensors, *files):
            check_basename(name, where="TrainCheckpoint.save")
        destination = self.directory / run_folder.name_of(step)
        tmp, failure = None, None
        if self._ranks.is_first:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                run_folder.remove_leftovers(self.directory)
                tmp = commit.make_tmp(destination)
                for name, write in files.items():
                    write(tmp / name)
            except Exception as error:
                failure = error
        self._agree(destination, tmp, failure)
        tmp = self._ranks.from_first(tmp)
        return _Save(step=step, tensors=tensors, state=state, info=info, tmp=tmp, destination=destination)

    def _finish(self, saving: _Save) -> Path:
        """Write the tensors and everything after them."""
        failure: Exception | None = None
        hashes: dict[str, str] = {}
        try:
            hashes = write_groups(saving.tmp, saving.tensors, self._ranks)
            if self._ranks.is_first:
                commit.write_json(saving.tmp / STATE_NAME, dict(saving.state))
                commit.fsync_tree(saving.tmp)
                facts = {**_facts(saving.step, self._ranks.size), "groups": sorted(saving.tensors)}
                commit.write_manifest(saving.tmp, {**saving.info, **facts}, hashes)
                commit.fsync_dir(saving.tmp)
        except Exception as error:
            failure = error
        self._agree(saving.destination, saving.tmp, failure)
        if self._ranks.is_first:
            try:
                run_folder.publish(saving.tmp, saving.destination)
            except OSError as error:
                failure = error
        self._agree(saving.destination, saving.tmp, failure)
        if self._ranks.is_first:
            kept = {saving.destination.name, *map(run_folder.name_of, self.keep)}
            run_folder.prune(self.directory, self.keep_last, kept)
        return saving.destination

    def _agree(self, destination: Path, tmp: Path | None, failure: Exception | None) -> None:
        """Raise on every rank what failed on any, after removing what was begun."""
        try:
            told = self._ranks.gather(None if failure is None else str(failure) or type(failure).__name__)
        except RuntimeError as error:  # a rank has died
            failure, told = error, [f"lost touch with the other ranks: {error}"]
        reasons = dict.fromkeys(reason for reason in told if reason is not None)  # each once, by rank
        if reasons:
            if tmp is not None and self._ranks.is_first:
                commit.remove_tree(tmp)
            raise CheckpointNotSaved(f"{destination}: not saved: {'; '.join(reasons)}") from failure

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def latest(self, *, hashes: bool = True) -> Path | None:
        """The newest checkpoint that is whole, or None. A damaged one is skipped with a warning that names the file.

        ``hashes=False`` compares sizes only: for checkpoints so large that reading them twice hurts.
        """
        found: Path | None = self._ranks.from_first(self._newest(hashes) if self._ranks.is_first else None)
        return found

    def remove_after(self, step: int) -> list[str]:
        """Remove the checkpoints of later steps, for a run that goes back to ``step``; returns their names."""
        later = [path for path in run_folder.candidates(self.directory) if run_folder.step_of(path) > step]
        for path in later:
            run_folder.remove(path)
        return [path.name for path in later]

    def _newest(self, hashes: bool) -> Path | None:
        for path in run_folder.links(self.directory):
            logger.warning("checkpoint %s is a link and is not used; copy the folder instead", plain(path))
        for path in reversed(run_folder.candidates(self.directory)):
            try:
                commit.verify(path, hashes=hashes)
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s cannot be used, falling back to an older one: %s", path.name, error)
                continue
            return path
        return None

    def restore(self, path: str | Path | None = None, *, into: Groups | None = None, hashes: bool = True) -> TrainState:
        """Read a checkpoint: ``path``, which must be whole, or the newest whole one.

        ``into``: group -> name -> tensor or DTensor, filled in place, whatever number of ranks saved them; names,
        shapes and dtypes must be as saved. Groups that are not in ``into`` are in the result, whole, read when used.
        """
        found = self.latest(hashes=hashes) if path is None else Path(path)
        if found is None:
            raise FileNotFoundError(f"{self.directory}: no usable checkpoint; start the run again")
        manifest = self._verified(found, hashes=hashes and path is not None)
        for group in into or {}:
            if group not in manifest["groups"]:
                raise ValueError(f"{found}: no group {group!r}, only {listed(manifest['groups'], 8)}; {_CURE}")
        if into:
            self._fill(found, into)
        groups: dict[str, Mapping[str, Tensor]] = {
            name: Group(found, check_basename(name, where=found))
            for name in manifest["groups"]
            if name not in (into or {})
        }
        state = read_json(found / STATE_NAME, found, cure=_CURE)
        return TrainState(step=manifest["step"], tensors=groups, state=state, path=found, manifest=manifest)

    def _verified(self, path: Path, *, hashes: bool) -> dict[str, Any]:
        """The manifest, after rank 0 has compared it with the files; the same error on every rank."""
        manifest: dict[str, Any] | Exception = {}
        if self._ranks.is_first:
            try:
                if not path.is_dir():
                    raise FileNotFoundError(f"{path}: no such checkpoint; {run_folder.describe(self.directory)}")
                manifest = commit.verify(path, hashes=hashes)
                run_folder.check_manifest(path, manifest)
            except (OSError, ValueError) as error:
                manifest = error
        manifest = self._ranks.from_first(manifest)
        if isinstance(manifest, Exception):
            raise manifest
        return manifest

    def _fill(self, path: Path, into: Groups) -> None:
        from tt_ckpt.train.sharded import fill

        failure = None
        try:
            fill(path, into)
        except (OSError, ValueError) as error:
            failure = error
        told = self._ranks.gather(None if failure is None else str(failure))
        if reasons := [reason for reason in told if reason is not None]:
            raise ValueError(reasons[0]) from failure


def _facts(step: int, world_size: int) -> dict[str, Any]:
    return {
        "format": "tt-ckpt training checkpoint",
        "version": run_folder.FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "tt_ckpt": version("tt-ckpt")},
    }
