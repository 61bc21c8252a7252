"""How the processes of a run find each other, and how a mistake that one of them finds ends all of them.

``tt run --nproc``, torchrun, Kubeflow (torchrun reads its PET_ variables) and SLURM all end in the same ``Place``, and
then in the same ``tt_train.devices.distributed.World``. https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from tt_train.devices.distributed import world
from tt_train.errors import WRONG, ConfigError, ShownElsewhere, TrainingError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
MEET_TIMEOUT_S = 600.0  # until every rank has come; its variable is TT_MEET_TIMEOUT_S
RESTARTED = "TT_RESTARTED"
END_S = 5.0  # within this time every rank that lives has seen that another has failed
_STORE: Store | None = None  # of a world of several, while this process is in it


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that a launcher started for one run. The address is that of rank 0."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"


# ---- where a launcher says that this process is ----------------------------------------------------------------------


def place(environ: Mapping[str, str] | None = None) -> Place | None:
    """What the variables of torchrun or SLURM say; None if this process was started alone.

    torchrun's come first: its ranks may run inside a job of SLURM. ConfigError if one is missing.
    """
    said = dict(os.environ if environ is None else environ)
    if "RANK" not in said or "WORLD_SIZE" not in said:
        said |= _of_slurm(said)
    if "RANK" not in said or "WORLD_SIZE" not in said:
        return None
    size = _number(said, "WORLD_SIZE", least=1)
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 and not said.get(name)]
    if lacking:
        raise ConfigError([f"{name}: missing; a process of {size} needs the address of rank 0" for name in lacking])
    rank = _number(said, "RANK", least=0)
    if rank >= size:
        raise ConfigError([f"RANK: must be below WORLD_SIZE {size}, got {rank}"])
    return Place(
        rank=rank,
        size=size,
        local_rank=_number({"LOCAL_RANK": str(rank), **said}, "LOCAL_RANK", least=0),
        address=said.get("MASTER_ADDR", "127.0.0.1"),
        port=_number({"MASTER_PORT": "29500", **said}, "MASTER_PORT", least=0),
    )


def is_restarted() -> bool:
    """Whether a launcher started these processes again, after a rank had died.

    The count of torchrun differs between machines, and is 0 on one that joins again; ``meet`` makes it known to all.
    """
    return any(os.environ.get(name, "0") != "0" for name in (RESTARTED, "TORCHELASTIC_RESTART_COUNT"))


def _number(said: Mapping[str, str], name: str, *, least: int) -> int:
    try:
        value = int(said[name])
    except ValueError:
        value = least - 1
    if not least <= value < 1 << 20:
        raise ConfigError([f"{name}: expected a whole number from {least} on, got {said[name][:40]!r}"])
    return value


def _of_slurm(said: Mapping[str, str]) -> dict[str, str]:
    """SLURM's variables of a task of ``srun`` under torchrun's names. https://slurm.schedmd.com/srun.html"""
    tasks = said.get("SLURM_STEP_NUM_TASKS") or said.get("SLURM_NTASKS") or "1"
    if "SLURM_PROCID" not in said or tasks == "1":
        return {}
    nodes = said.get("SLURM_STEP_NODELIST") or said.get("SLURM_NODELIST") or said.get("SLURM_JOB_NODELIST") or ""
    job = re.sub(r"\D", "", said.get("SLURM_JOB_ID", "")) or "0"
    return {
        "RANK": said["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": said.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": said.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": said.get("MASTER_PORT") or str(20_000 + int(job) % 10_000),  # two jobs may share a node
    }


def first_host(nodes: str) -> str:
    """The first name of a SLURM list of nodes such as ``gpu[03-05,9],login``: ``gpu03``."""
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host):
        raise ConfigError([f"SLURM_NODELIST: expected names such as gpu[01-04], got {nodes[:80]!r}"])
    return host


# ---- one store, one process group ------------------------------------------------------------------------------------


def meet(here: Place, *, timeout_s: float | None = None) -> Store:
    """A store that every rank has reached. TrainingError names the ranks that did not come within ``timeout_s``."""
    limit = timeout_s or float(os.environ.get("TT_MEET_TIMEOUT_S") or MEET_TIMEOUT_S)
    hosts = here.rank == 0 and not _agent_hosts()
    began = time.monotonic()
    try:
        server: Store = dist.TCPStore(  # type: ignore[attr-defined]
            here.address, here.port, is_master=hosts, timeout=timedelta(seconds=limit), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(_no_store(here, hosts, limit, error)) from error
    # a store of the agent's is there before and after a restart
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_hosts() else "0"
    store: Store = dist.PrefixStore(f"tt/{attempt}", server)  # type: ignore[attr-defined]
    if is_restarted():
        store.set("restarted", "")
    store.set(f"here/{here.rank}", "")
    left = max(0.1, limit - (time.monotonic() - began))
    if here.rank == 0:
        missing = _absent(store, "here", here.size, left)
        store.set("missing", json.dumps(missing))
        if missing:  # this process takes the store with it: the others read first
            store.set("read/0", "")
            _absent(store, "read", here.size, END_S, besides=missing)
    else:
        try:
            store.wait(["missing"], timedelta(seconds=left + END_S))
            missing = json.loads(store.get("missing"))
            store.set(f"read/{here.rank}", "")
        except RuntimeError:
            missing = [0]
    if missing:
        raise TrainingError(f"{_named(missing)} of {here.size} did not come to {here.endpoint} within {limit:g} s")
    if store.check(["restarted"]):  # set before its rank was here
        os.environ[RESTARTED] = "1"
    return store


def _agent_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _no_store(here: Place, hosts: bool, limit: float, error: Exception) -> str:
    if not hosts:
        return f"rank 0 of {here.size} does not answer at {here.endpoint} within {limit:g} s; this is rank {here.rank}"
    why = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error):
        why = "the port is in use; choose another MASTER_PORT"
    return f"rank 0 cannot listen at {here.endpoint}: {why}"


def _absent(store: Store, key: str, size: int, wait_s: float, besides: list[int] | None = None) -> list[int]:
    """The ranks that have not set ``key/RANK`` after ``wait_s``."""
    waited = [rank for rank in range(size) if rank not in (besides or [])]
    with suppress(RuntimeError):
        store.wait([f"{key}/{rank}" for rank in waited], timedelta(seconds=wait_s))
        return []
    return [rank for rank in waited if not store.check([f"{key}/{rank}"])]


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


@contextmanager
def joined(here: Place, store: Store, *, device_type: str, timeout_s: float) -> Iterator[None]:
    """The process group of the ranks that have met, while the block runs.

    timeout_s: a collective that some rank does not come to for so long is an error on the others.
    """
    global _STORE
    own = "" if device_type == "cpu" else f",{device_type}:{dist.get_default_backend_for_device(device_type)}"
    os.environ["LOCAL_RANK"] = str(here.local_rank)  # SLURM has another name for it
    group = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(f"cpu:gloo{own}", store=group, rank=here.rank, world_size=here.size, timeout=limit)
    _STORE = store
    try:
        yield
    finally:
        _STORE = None
        with suppress(RuntimeError):  # a lost rank is an error already
            dist.destroy_process_group()


# ---- one mistake for all ---------------------------------------------------------------------------------------------


def everywhere(action: Callable[[], T], *, met: tuple[Place, Store] | None = None) -> T:
    """``action()``, made by every rank. If it fails on one it fails on all, and each mistake is shown once.

    met: for ranks that have no process group yet.
    Raises: the error of this rank; ShownElsewhere if it is another rank's, or the same as that of a lower rank.
    """
    rank, size = (met[0].rank, met[0].size) if met else (world().rank, world().size)
    if size == 1:
        return action()
    error: Exception | None = None
    try:
        value = action()
    except Exception as problem:
        error = problem
    mine = None if error is None else [exit_code_of(error), str(error)]
    told = _gathered(*met, mine) if met else world().gather(mine)
    if error is not None and mine not in told[:rank]:
        raise error
    if failed := [answer for answer in told if answer is not None]:
        raise ShownElsewhere(failed[0][0]) from error
    return value


def decided(action: Callable[[], T]) -> T:
    """Rank 0's ``action()`` on every rank, or its error: for what only one process may look at or write."""
    found: T = world().from_main(everywhere(lambda: action() if world().is_main else None))
    return found


def exit_code_of(error: BaseException) -> int:
    """2 for a mistake that the user can correct, 1 for a failure."""
    return 2 if isinstance(error, WRONG) else 1


def _gathered(here: Place, store: Store, value: Any) -> list[Any]:
    store.set(f"checked/{here.rank}", json.dumps(value))
    if missing := _absent(store, "checked", here.size, MEET_TIMEOUT_S):
        raise TrainingError(f"{_named(missing)} did not answer for {MEET_TIMEOUT_S:g} s")
    found = [json.loads(store.get(f"checked/{rank}")) for rank in range(here.size)]
    store.set(f"left/{here.rank}", "")
    if here.rank == 0 and any(found):  # the store ends with this process
        _absent(store, "left", here.size, END_S)
    return found


# ---- a rank that is lost ---------------------------------------------------------------------------------------------


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed, which means that another rank has ended, hangs or cannot be reached."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo/|NCCL|ProcessGroup|Connection closed by", str(error))
    )


def ending(step: int, error: BaseException) -> str:
    """Why this rank cannot save together with the others after ``error``; empty if every rank is at the same place.

    Every rank that ends says so in the store. One that does not within a few seconds is dead, or waits for this one.
    """
    size, rank = world().size, world().rank
    if size == 1 or _STORE is None:  # None: of a process group that is not ours
        return "" if size == 1 else "the other ranks cannot be asked"
    lost = is_lost(error)
    try:
        _STORE.set(f"end/{rank}", json.dumps({"step": step, "lost": lost, "error": str(error)[:500]}))
        silent = _absent(_STORE, "end", size, END_S)
        others = {other: json.loads(_STORE.get(f"end/{other}")) for other in range(size) if other not in silent}
    except RuntimeError:
        silent, others = [0], {}
    if silent:
        return f"{_named(silent)} {'does' if len(silent) == 1 else 'do'} not answer"
    if not any(end["lost"] for end in others.values()):
        return "" if all(end["step"] == step for end in others.values()) else "the ranks are at different steps"
    cause = next((f"rank {other} failed: {end['error']}" for other, end in others.items() if not end["lost"]), None)
    return cause if lost and cause else "the ranks lost touch"
