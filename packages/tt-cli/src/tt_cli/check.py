"""``tt run --check``: do all processes find each other, and can they add up a number? For run alone, which is long."""

import socket
import time
from collections.abc import Sequence

import torch

from tt_cli.terminal import answer, tell
from tt_train.devices.distributed import world
from tt_train.devices.launch import Place, joined, meet
from tt_train.errors import TrainingError, counted


def check_ranks(here: Place | None, torchrun: Sequence[str], nproc: str | None, *, timeout_s: int) -> int:
    """As one rank, meet the others; as none, start them. Returns the exit code."""
    if here is None:
        from tt_cli import agent

        limit = f"--rdzv-conf=timeout={timeout_s},join_timeout={timeout_s},last_call_timeout=1"
        wanted = agent.asked_for([*torchrun, limit], nproc)
        tell(
            f"rendezvous: {wanted.options.rdzv_backend} at {wanted.options.rdzv_endpoint or 'MASTER_ADDR:MASTER_PORT'}"
        )
        return agent.start(wanted, ["run", "--check", "--check-timeout", str(timeout_s)], None)
    if here.rank == 0:
        tell(f"rank 0 of {here.size} listens at {here.endpoint}")
    device = torch.accelerator.current_accelerator(check_available=True)
    found = check(here, timeout_s=timeout_s, device_type=device.type if device else "cpu")
    if here.rank == 0:
        answer(found)
    return 0


def check(here: Place, *, timeout_s: float, device_type: str) -> str:
    """Meet, and add up a one of every rank; returns what was found. TrainingError names the ranks that are missing."""
    store = meet(here, timeout_s=timeout_s)
    began = time.perf_counter()
    try:
        with joined(here, store, device_type=device_type, timeout_s=timeout_s):
            hosts = world().gather(socket.gethostname())
            device = torch.device(device_type, here.local_rank) if device_type != "cpu" else torch.device("cpu")
            total = int(world().sum(torch.ones((), device=device)))
    except RuntimeError as error:
        raise TrainingError(f"an all_reduce at {here.endpoint} failed: {str(error).splitlines()[0]}") from error
    if total != here.size:
        raise TrainingError(f"an all_reduce of {here.size} ranks gave {total}")
    took = f"{1000 * (time.perf_counter() - began):.0f} ms"
    return f"{counted(here.size, 'rank')} on {', '.join(dict.fromkeys(hosts))}; joining and an all_reduce took {took}"
