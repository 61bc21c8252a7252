"""The processes of a run: who this one is, and what all of them agree on.

Everybody asks ``world()`` and nobody ``torch.distributed``, so that one process needs no process group. It works the
same over gloo (CPU) and NCCL (CUDA).
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train one model. Each reads its own share of every batch (data parallel).

    rank: from 0 to ``size - 1``. local_rank: the rank among the ``local_size`` processes of this machine, which chooses
    the GPU.
    Every method is a collective: if one rank calls it, all must, in the same order. A world of one has no one to ask.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes the run directory."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor``, on its device. The argument is not changed."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(_device(tensor.device), copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        return (self.size > 1 and bool(self.sum(torch.tensor(int(flag))))) or flag

    def from_main(self, value: Any) -> Any:
        """Rank 0's ``value``: a small object that pickles."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of the ranks: small objects that pickle."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self.sum(torch.zeros(()))


def world() -> World:
    """The world of this process: that of ``torch.distributed`` if it is initialized, else a world of one."""
    if not dist.is_available() or not dist.is_initialized():
        return World()
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank, local_size = (
        int(os.environ.get(f"LOCAL_{name}", one)) for name, one in (("RANK", rank), ("WORLD_SIZE", size))
    )
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def _device(device: torch.device) -> torch.device:
    """Where a collective can be done: NCCL alone takes no tensor of the CPU."""
    if device.type == "cpu" and "gloo" not in str(dist.get_backend_config()):
        return torch.device(torch.accelerator.current_device_index())
    return device
