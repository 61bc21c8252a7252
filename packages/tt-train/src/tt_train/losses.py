"""Objectives: each takes a model and a micro-batch and returns *sums*; the step divides them once.

Shapes: B batch, S sequence, N positions (flattened), D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_peft.lowrank import AdapterModule

Batch = dict[str, Tensor]  # input_ids, labels and, if documents share rows, position_ids; each [B, S]


class CausalLM(Protocol):
    """What an objective may ask of a model. Every ``tt_models.Decoder`` is one, with and without an adapter."""

    @property
    def lm_head(self) -> nn.Module | None:
        """The output projection; None if it is the embeddings."""

    @property
    def logit_softcap(self) -> float | None:
        """``c`` of the logits' ``c * tanh(logit / c)``, if they are bounded."""

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: the output projection."""

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[B, S, D] after the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As in ``nn.Module``."""


class Summed(NamedTuple):
    """Sums over a micro-batch. The step adds them up and divides by the sum of ``count``.

    loss: a differentiable scalar. count: the number of items that it sums, such as trained tokens or pairs of answers.
    tokens: trained tokens, which the speed and ``tokens`` of metrics.jsonl count. metrics: further sums by name; their
    means are figures of the step, in metrics.jsonl, on the console and in the report.
    """

    loss: Tensor
    count: int  # type: ignore[assignment]  # a tuple's method, which nobody needs here
    tokens: int
    metrics: Mapping[str, Tensor] = MappingProxyType({})


Objective = Callable[[CausalLM, Batch], Summed]
IGNORE = -100
CHUNK_BYTES = 64 * 2**20  # of fp32 logits alive at a time
CHUNKS_IN_LOW_PRECISION = 4  # parts of a bf16 gradient that are added up before their sum is added up in fp32


def cross_entropy(model: CausalLM, batch: Batch, *, label_smoothing: float = 0.0) -> Summed:
    """Next-token cross entropy, summed over the trained tokens in fp32.

    Position t predicts ``labels[:, t + 1]``; -100 means no loss.
    """
    hidden_BSD = model.hidden_states(batch["input_ids"], position_ids=batch.get("position_ids"))
    targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    keep = targets_BS != IGNORE
    hidden_ND, targets_N = hidden_BSD[keep], targets_BS[keep]
    count = targets_N.numel()
    softcap = model.logit_softcap
    if isinstance(model.lm_head, AdapterModule):  # its weight alone is not the output projection
        logits_NV = model.lm_head(hidden_ND).float()
        if softcap:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        loss = F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=label_smoothing)
    else:
        options: dict[str, Any] = {"reduction": "sum", "label_smoothing": label_smoothing, "softcap": softcap}
        loss = linear_cross_entropy(hidden_ND, model.output_weight, targets_N, **options)
    return Summed(loss, count, tokens=count)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T, labels)`` in fp32 without ever holding all logits.

    The gradients are computed in the forward, a chunk of positions at a time, so that nothing but them is kept; ignored
    positions cost nothing, and a frozen weight gets no gradient work.

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] the target of each position (not shifted), -100 to ignore.
        reduction: ``mean`` over the positions not ignored (nan if there are none, as in torch), or ``sum``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        chunk_size: positions at a time; by default what keeps the fp32 logits of a chunk under 64 MB.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    hidden_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep = labels_N != IGNORE
    if not bool(keep.all()):
        hidden_ND, labels_N = hidden_ND[keep], labels_N[keep]
    chunk_size = chunk_size or max(16, CHUNK_BYTES // (4 * weight.shape[0]))
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight, labels_N, label_smoothing, softcap, chunk_size
    )
    return total if reduction == "sum" else total / labels_N.numel()


class _WeightGradient:
    """The sum over chunks of ``grad.T @ hidden``: a few in the weight's dtype, and those sums in fp32.

    In bf16 alone the parts of a long sequence would be lost in a sum that grows.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.few_VD = torch.zeros_like(weight_VD)
        self.many_VD: Tensor | None = None
        self.chunks = 0

    def add_(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        self.few_VD.addmm_(grad_CV.T, hidden_CD)
        self.chunks += 1
        if self.few_VD.dtype.itemsize < 4 and self.chunks % CHUNKS_IN_LOW_PRECISION == 0:
            self.many_VD = self.total().float()
            self.few_VD.zero_()

    def total(self) -> Tensor:
        return self.few_VD if self.many_VD is None else self.many_VD.add_(self.few_VD)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over positions; its gradients stand ready when forward ends and are only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        smoothing: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = _WeightGradient(weight_VD) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden_ND[part], weight_VD).float()
            loss, grad_CV = _loss_and_gradient_(
                logits_CV, labels_N[part], smoothing, softcap, needs_hidden or needs_weight
            )
            total += loss
            if grad_CV is not None:
                grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None and grad_CV is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
            if grad_weight is not None and grad_CV is not None:
                grad_weight.add_(grad_CV, hidden_ND[part])
        ctx.save_for_backward(grad_hidden_ND, None if grad_weight is None else grad_weight.total())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        scaled = [None if kept is None else kept * grad.to(kept.dtype) for kept in (grad_hidden_ND, grad_weight_VD)]
        return scaled[0], scaled[1], None, None, None, None


def _loss_and_gradient_(
    logits_CV: Tensor, labels_C: Tensor, smoothing: float, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss, and its gradient by the logits, which is written over them."""
    if softcap:
        logits_CV.div_(softcap).tanh_()
        slope_CV = 1 - logits_CV.square() if needs_gradient else None
        logits_CV.mul_(softcap)
    log_z_C = torch.logsumexp(logits_CV, dim=-1)
    picked_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    loss = (log_z_C - (1 - smoothing) * picked_C).sum()
    if smoothing:
        loss = loss - smoothing * logits_CV.mean(dim=-1).sum()
    if not needs_gradient:
        return loss, None
    grad_CV = logits_CV.sub_(log_z_C[:, None]).exp_()
    if smoothing:
        grad_CV.sub_(smoothing / logits_CV.shape[1])
    grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(picked_C, smoothing - 1)[:, None])
    return loss, grad_CV.mul_(slope_CV) if softcap and slope_CV is not None else grad_CV
