"""The processes of a run, with or without ``torch.distributed``, and the tensors that are spread over them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch.distributed as dist
from torch import Tensor

from tt_ckpt.safetensors_file import are_sizes, is_shape

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MAX_BOXES = 4096  # of one tensor, which no number of ranks needs


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``; ``group`` carries small objects between CPUs."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


def current(timeout_s: float | None = None) -> Ranks:
    """All ranks of the run, with a gloo group of their own. If there are several, every rank must call this.

    timeout_s: how long they wait for one of them. torch's default is half an hour, whatever that of the run's group.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    limit = None if timeout_s is None else timedelta(seconds=timeout_s)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=limit))


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. Nothing is imported to find out: without its module there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def chunk_of(tensor: "DTensor") -> Any:
    """``offsets`` and ``sizes`` of the part that this rank holds."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return chunk


def like_dtensor(local: Tensor, like: "DTensor") -> "DTensor":
    """A DTensor with the placements of ``like`` and other local values."""
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


# ---- boxes: parts of a tensor, by offsets and sizes ------------------------------------------------------------------


def box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The part of ``tensor`` that begins at ``offsets`` and has ``sizes``: a view."""
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def is_cover(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes (offsets and sizes) are inside ``shape``, do not overlap and cover all of it."""
    if not is_shape(shape):
        return False
    for offsets, sizes in boxes:
        if not are_sizes(offsets) or not are_sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            return False
        if any(offset + size > limit for offset, size, limit in zip(offsets, sizes, shape, strict=True)):
            return False
    if sum(prod(sizes) for _, sizes in boxes) != prod(shape):
        return False
    full = [box for box in boxes if prod(box[1])]
    if len(full) < 2 or not shape:
        return len(full) < 2
    if len(full) > _MAX_BOXES:
        return False
    begin = np.array([offsets for offsets, _ in full], dtype=np.int64)
    end = begin + np.array([sizes for _, sizes in full], dtype=np.int64)
    overlaps = (((begin[i + 1 :] < end[i]) & (begin[i] < end[i + 1 :])).all(axis=1) for i in range(len(full) - 1))
    return not any(bool(found.any()) for found in overlaps)
