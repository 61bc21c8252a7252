"""Training state on disk: saved whole or not at all, verified when read, never the only copy.

A checkpoint is a folder ``step-000200`` with safetensors files for each group of tensors, ``state.json``, the files of
the caller, and a manifest. It has no pickle. Under ``torch.distributed`` every rank makes the same calls: each writes
and reads the parts that it holds (see ``sharded``), and rank 0 does the rest.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from tt_ckpt import commit, ranks
from tt_ckpt.files import read_json
from tt_ckpt.safe_names import check_basename, from_home
from tt_ckpt.safetensors_file import write_tensor_dict
from tt_ckpt.shown import listed, plain
from tt_ckpt.train import run_folder
from tt_ckpt.train.tensor_groups import Group, Groups

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
_CURE = "use an older checkpoint"
Files = Mapping[str, Callable[[Path], None]]


class CheckpointNotSaved(RuntimeError):  # noqa: N818  (the name says what happened)
    """A save failed; what was there before is untouched. ``__cause__`` is the reason."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A restored checkpoint. Its tensors are read when they are asked for: copy those that must last."""

    step: int
    tensors: dict[str, Group]
    state: dict[str, Any]
    path: Path
    manifest: dict[str, Any]


@dataclass
class _Save:
    """A checkpoint that is being saved."""

    step: int
    tensors: Groups
    state: Mapping[str, Any]
    info: Mapping[str, Any]
    tmp: Path
    destination: Path


class TrainCheckpoint:
    """The checkpoints of one run: the newest ``keep_last`` (at least 2) and those of the steps in ``keep``.

    ``timeout_s``: how long ranks wait for one that hangs.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2, timeout_s: float | None = None) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, in case the newest is damaged; got {keep_last}")
        self.directory = from_home(directory)
        self.keep_last = keep_last
        self.timeout_s = timeout_s
        self.keep: set[int] = set()
        self._pending: futures.Future[Path] | None = None

    @cached_property
    def _ranks(self) -> ranks.Ranks:
        return ranks.current(self.timeout_s)  # a collective, so made by the first call that is one anyway

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

        ``tensors``: group -> name -> tensor. ``state``: data for JSON (rank 0's is saved). ``files``: name -> function
        that writes that file or folder (called on rank 0). ``info``: further keys of the manifest.
        On several ranks a plain tensor must be equal on all ranks that use its name: otherwise put the rank into the
        name. Raises CheckpointNotSaved on every rank; nothing of it is left, and older checkpoints are unchanged.
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
        """``save`` copies that are made now, in the background. The next ``check``, ``wait`` or save raises a failure.

        A second call waits until the first save has ended.
        """
        self.wait()
        saving = self._begin(step, _copies(tensors), copy.deepcopy(dict(state)), files or {}, info or {})
        self._pending = (thread := futures.ThreadPoolExecutor(1)).submit(self._finish, saving)
        thread.shutdown(wait=False)

    def check(self) -> Path | None:
        """Call this at every step. Returns the folder of a background save that has ended, or raises its failure."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self, timeout: float | None = None) -> Path | None:
        """The same after waiting for the background save; None if it has not ended after ``timeout`` seconds."""
        if self._pending is None or not futures.wait([self._pending], timeout).done:
            return None
        ended, self._pending = self._pending, None
        return ended.result()

    def preflight(self, nbytes: int, *, copies: int | None = None, besides: int = 0) -> None:
        """OSError unless the folder can be written and has room for ``copies`` checkpoints of ``nbytes``.

        Call this before training. The default of ``copies`` is ``keep_last`` + 1: one is written before the oldest is
        removed. Existing checkpoints count. ``besides``: bytes of other files for the same disk, such as the result.
        """
        run_folder.preflight(self.directory, nbytes, self.keep_last + 1 if copies is None else copies, besides)

    def _begin(
        self, step: int, tensors: Groups, state: Mapping[str, Any], files: Files, info: Mapping[str, Any]
    ) -> _Save:
        """Check the names, remove leftovers, make the folder and let the caller's functions write."""
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
        """Write the tensors, the state and the manifest, and give the folder its name."""
        failure: Exception | None = None
        hashes: dict[str, str] = {}
        try:
            hashes = write_groups(saving.tmp, saving.tensors, self._ranks)
            if self._ranks.is_first:
                commit.write_json(saving.tmp / STATE_NAME, dict(saving.state))
                commit.fsync_tree(saving.tmp)
                facts = run_folder.manifest_facts(saving.step, self._ranks.size)
                facts["groups"] = sorted(saving.tensors)
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
        """If any rank failed, remove the unfinished checkpoint and raise CheckpointNotSaved on every rank."""
        try:
            found = self._ranks.gather(None if failure is None else str(failure) or type(failure).__name__)
        except RuntimeError as error:  # a rank has died
            failure, found = error, [f"lost touch with the other ranks: {error}"]
        reasons = dict.fromkeys(reason for reason in found if reason is not None)  # each once, by rank
        if reasons:
            if tmp is not None and self._ranks.is_first:
                commit.remove_tree(tmp)
            raise CheckpointNotSaved(f"{destination}: not saved: {'; '.join(reasons)}") from failure

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def latest(self, *, hashes: bool = True, together: bool = True) -> Path | None:
        """The newest whole checkpoint, or None. A damaged one is skipped, with a warning that names the file.

        ``hashes=False`` compares sizes only, of large ones. ``together=False`` asks no other rank: some may be gone.
        """
        among = self._ranks if together else ranks.Ranks()
        return cast("Path | None", among.from_first(self._newest(hashes) if among.is_first else None))

    def remove_after(self, step: int) -> list[str]:
        """Remove the checkpoints of later steps, for a run that returns to ``step``. Returns their names."""
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
        """Read the checkpoint ``path``, which must be whole, or the newest whole one.

        ``into``: group -> name -> tensor or DTensor to fill in place. Any number of ranks may have saved them; names,
        shapes and dtypes must be as saved. The result has the other groups, whose tensors are read when used.
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
        groups = {
            name: Group(found, check_basename(name, where=found))
            for name in manifest["groups"]
            if name not in (into or {})
        }
        state = read_json(found / STATE_NAME, found, cure=_CURE)
        return TrainState(step=manifest["step"], tensors=groups, state=state, path=found, manifest=manifest)

    def _verified(self, path: Path, *, hashes: bool) -> dict[str, Any]:
        """The manifest, which rank 0 has compared with the files; every rank raises the same error."""
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
        from tt_ckpt.train.sharded import read_sharded

        failure = None
        try:
            read_sharded(path, into)
        except (OSError, ValueError) as error:
            failure = error
        found = self._ranks.gather(None if failure is None else str(failure))
        if reasons := [reason for reason in found if reason is not None]:
            raise ValueError(reasons[0]) from failure


def _copies(tensors: Groups) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU that further training does not change."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    staged: dict[str, dict[str, Tensor]] = BlockingAsyncStager().stage({k: dict(v) for k, v in tensors.items()})
    return staged


def write_groups(folder: Path, tensors: Groups, among: ranks.Ranks) -> dict[str, str]:
    """Write one file per group, or one per group and rank if tensors are spread over ranks. Returns their sha256."""
    if among.size > 1 or any(ranks.is_dtensor(tensor) for named in tensors.values() for tensor in named.values()):
        from tt_ckpt.train.sharded import save_sharded

        return save_sharded(folder, tensors, among)
    hashes = {}
    for group, named in tensors.items():
        digest = write_tensor_dict(folder / f"{group}.safetensors", named, hashed=True)
        assert digest is not None
        hashes[f"{group}.safetensors"] = digest
    return hashes
