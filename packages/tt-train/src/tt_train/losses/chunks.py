"""Logits a chunk of positions at a time: what every loss over a vocabulary does with an output projection.

Shapes: N positions, D hidden size, V vocabulary, C positions of a chunk, R of a block of its rows.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tt_models.cpu.products import multiply_ as multiply_  # of the losses, too

CHUNK_BYTES = 64 * 2**20  # of logits alive at a time
CACHED_BYTES = 2**20  # of fp32 logits: they stay in the cache of a CPU's core from the first operation to the last
KEPT_HEADS = 2  # logits that are kept for the backward pass take so many times the memory of the weight at most
PRODUCTS_IN_LOW_PRECISION = 4  # parts of a bf16 gradient that are added up before their sum is added up in fp32


def chunk_of(weight_VD: Tensor, *, itemsize: int = 4) -> int:
    """Positions whose logits, of ``itemsize`` bytes each, are alive at a time."""
    return max(16, CHUNK_BYTES // (itemsize * weight_VD.shape[0]))


def chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    *,
    size: int | None = None,
    trains: bool = False,
    keep: dict[int, Tensor] | None = None,
    kept: dict[int, Tensor] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of positions, and their logits [C, V] in the dtype of the weight, which the next chunk overwrites.

    size: positions at a time; by default what takes 64 MB, or 128 MB if the weight ``trains`` in low precision: its
    gradient is a sum of products, each of which is rounded. keep: logits of the first chunks stay here, by their first
    position, while they take no more than ``KEPT_HEADS`` weights. kept: those that are here are not computed again;
    each is taken out, because its user writes over it.
    """
    num, itemsize = len(hidden_ND), weight_VD.dtype.itemsize
    most = size or chunk_of(weight_VD, itemsize=itemsize) * (2 if trains and itemsize < 4 else 1)
    each = -(-num // -(-num // most)) if num else 1  # chunks of one size
    room = 0 if keep is None else KEPT_HEADS * weight_VD.shape[1]  # positions
    buffer_CV = hidden_ND.new_empty(0)
    for start in range(0, num, each):
        part = slice(start, min(start + each, num))
        if kept and start in kept:
            yield part, kept.pop(start)
            continue
        if part.stop <= room and keep is not None:
            logits_CV = keep[start] = hidden_ND.new_empty(part.stop - start, weight_VD.shape[0])
        else:
            buffer_CV = buffer_CV if len(buffer_CV) else hidden_ND.new_empty(each, weight_VD.shape[0])
            logits_CV = buffer_CV[: part.stop - start]
        yield part, multiply_(logits_CV, hidden_ND[part], weight_VD.T)


def by_rows_(formula: Callable[..., Tensor | None], logits_CV: Tensor, *others: Tensor) -> None:
    """``formula`` of each block of rows: the logits in fp32, and the same rows of ``others``, where it puts results.

    What it returns is written over the logits. Of logits without numbers, the first block stands for all: the others
    take the same memory, one after the other.
    """
    size = CACHED_BYTES if logits_CV.device.type == "cpu" else CHUNK_BYTES // 2
    each = max(1, size // (4 * logits_CV.shape[1]))
    starts = range(0, len(logits_CV), each)
    for start in starts[:1] if isinstance(logits_CV, FakeTensor) else starts:
        rows = slice(start, start + each)
        logits_RV = logits_CV[rows].float()
        result_RV = formula(logits_RV, *(other[rows] for other in others))
        if result_RV is not None:
            logits_CV[rows] = result_RV
        del logits_RV, result_RV  # before the next ones


def probabilities(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of each row, and the logarithm of its sum of exponentials, with one exponential per logit.

    That logarithm comes from the likeliest token: its probability is at least 1 / V, so it has all its digits.
    """
    p_RV = logits_RV.softmax(dim=-1)
    return p_RV, logits_RV.amax(dim=-1) - p_RV.amax(dim=-1).log()


def cap_(logits_RV: Tensor, softcap: float | None, *, slope: bool) -> Tensor | None:
    """Bound the logits, in place; the slope of the bound, if there is one and it is asked for."""
    if not softcap:
        return None
    logits_RV.div_(softcap).tanh_()
    slope_RV = 1 - logits_RV.square() if slope else None
    logits_RV.mul_(softcap)
    return slope_RV


def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, detached if no gradient is wanted: ``ctx.needs_input_grad`` is true under ``no_grad`` as well."""
    return tensors if torch.is_grad_enabled() else tuple(tensor.detach() for tensor in tensors)


class WeightGradient:
    """The sum over chunks of ``grad.T @ hidden``.

    A product of bf16 factors is rounded once, and those of a long sequence would be lost in a bf16 sum that grows. So
    every few products the sum is added up in fp32.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.few_VD = torch.zeros_like(weight_VD)
        self.many_VD: Tensor | None = None
        self.products = 0

    def add(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        """Both in the dtype of the weight."""
        if self.products == PRODUCTS_IN_LOW_PRECISION and self.few_VD.dtype.itemsize < 4:
            self.many_VD, self.products = self.total().float(), 0
            self.few_VD.zero_()
        multiply_(self.few_VD, grad_CV.T, hidden_CD, add=True)
        self.products += 1

    def total(self) -> Tensor:
        """The sum so far, which later ones may overwrite."""
        return self.few_VD if self.many_VD is None else self.many_VD.add_(self.few_VD)
