"""Models that are sharded over ranks: every read of a tensor is then a collective, in the same order everywhere."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tt_ckpt import ranks
from tt_ckpt.hf.weights import Weights


def is_spread(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank where it is a DTensor."""
    tensor = tensor.detach()
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds of the DTensor ``like``: a view, so that only it is read."""
    (chunk,) = like.__create_chunk_list__()  # type: ignore[attr-defined]
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def like_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """A DTensor placed as ``like``, with other local values."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    made: Tensor = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def write_together(weights: Weights, order: list[str], write: Callable[[Weights], None]) -> None:
    """Run ``write`` on rank 0 while all ranks read the tensors in ``order`` with it; its failure is raised on all."""
    among = ranks.current()
    position = 0

    def get(key: str) -> Tensor:
        nonlocal position
        assert key == order[position], "tensors must be read in the order that was announced"
        position += 1
        return weights.get(key)

    failure: Exception | None = None
    if among.is_first:
        try:
            write(replace(weights, get=get))
        except Exception as error:
            failure = error
    for key in order[position:]:  # also after a failure: the other ranks are waiting in these reads
        weights.get(key)
    told = among.from_first(failure)
    if told is not None:
        raise told
