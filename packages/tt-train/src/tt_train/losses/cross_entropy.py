"""Objectives: each takes a model and a micro-batch and returns *sums*; the step divides them once.

Shapes: B batch, S sequence, N positions (flattened), D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tt_peft import NF4Linear
from tt_peft.full_modules import SavedModule
from tt_peft.lowrank import AdapterModule
from tt_train.losses.chunks import (
    WeightGradient,
    by_rows_,
    cap_,
    chunk_of,
    chunks,
    differentiable,
    multiply_,
    probabilities,
)

T = TypeVar("T")

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

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor | None = None, *, keep: Tensor | None = None
    ) -> Tensor:
        """[B, S, D] after the final norm; [N, D] of the N positions where ``keep`` [B, S] is True."""

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


def cross_entropy(model: CausalLM, batch: Batch, *, label_smoothing: float = 0.0) -> Summed:
    """Next-token cross entropy, summed over the trained tokens in fp32.

    Position t predicts ``labels[:, t + 1]``; -100 means no loss.
    """
    targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    keep = targets_BS != IGNORE
    hidden_ND = model.hidden_states(batch["input_ids"], position_ids=batch.get("position_ids"), keep=keep)
    targets_N = targets_BS[keep]
    count, weight = targets_N.numel(), output_projection(model)
    options: dict[str, Any] = {"reduction": "sum", "label_smoothing": label_smoothing}
    if weight is None:
        parts = by_chunks(
            lambda logits, targets: F.cross_entropy(logits, targets, **options), model, hidden_ND, targets_N
        )
        loss = torch.stack(parts).sum()
    else:
        loss = linear_cross_entropy(hidden_ND, weight, targets_N, softcap=model.logit_softcap, **options)
    return Summed(loss, count, tokens=count)


def output_projection(model: CausalLM) -> Tensor | None:
    """[V, D], by which hidden states are multiplied; None if the head is more than a matrix: low-rank factors, NF4.

    The factors are not added to the weight, whose dtype would lose small changes, and their dropout stays.
    """
    if isinstance(model.lm_head, SavedModule):
        return model.lm_head.effective_weight()
    return None if isinstance(model.lm_head, AdapterModule | NF4Linear) else model.output_weight


def by_chunks(formula: Callable[[Tensor, Tensor], T], model: CausalLM, hidden_ND: Tensor, labels_N: Tensor) -> list[T]:
    """``formula(logits [C, V] in fp32, labels [C])`` of each chunk of positions, for a head that is not one matrix.

    The logits of a chunk are computed again in the backward pass, with the same dropout.
    """
    softcap, size = model.logit_softcap, chunk_of(model.output_weight)

    def of_chunk(hidden_CD: Tensor, labels_C: Tensor) -> T:
        assert model.lm_head is not None
        logits_CV = model.lm_head(hidden_CD).float()
        return formula(softcap * torch.tanh(logits_CV / softcap) if softcap else logits_CV, labels_C)

    chunks = zip(hidden_ND.split(size), labels_N.split(size), strict=True)  # type: ignore[no-untyped-call]
    return [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]


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
        chunk_size: positions at a time; by default what keeps the logits of a chunk under 64 MB (128 MB if a weight in
            bf16 trains).
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
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *differentiable(hidden_ND, weight), labels_N, label_smoothing, softcap, chunk_size
    )
    return total if reduction == "sum" else total / labels_N.numel()


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
        size: int | None,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = WeightGradient(weight_VD) if needs_weight else None
        loss_N = torch.zeros(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        formula = partial(
            _loss_and_gradient, smoothing=smoothing, softcap=softcap, needs_gradient=needs_hidden or needs_weight
        )
        for part, logits_CV in chunks(hidden_ND, weight_VD, size=size, trains=needs_weight):
            by_rows_(formula, logits_CV, labels_N[part], loss_N[part])
            if grad_hidden_ND is not None:
                multiply_(grad_hidden_ND[part], logits_CV, weight_VD)
            if grad_weight is not None:
                grad_weight.add(logits_CV, hidden_ND[part])
        ctx.gradients = grad_hidden_ND, None if grad_weight is None else grad_weight.total()
        return loss_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: one backward pass only, since its gradients are used up by it")
        gradients, ctx.gradients = ctx.gradients, None  # given away: nobody copies them
        scaled = [None if kept is None else kept.mul_(grad.to(kept.dtype)) for kept in gradients]
        return scaled[0], scaled[1], None, None, None, None


def _loss_and_gradient(
    logits_RV: Tensor,
    labels_R: Tensor,
    loss_R: Tensor,
    *,
    smoothing: float,
    softcap: float | None,
    needs_gradient: bool,
) -> Tensor | None:
    """Write the loss of each position; returns its gradient by the logits, if it is needed."""
    slope_RV = cap_(logits_RV, softcap, slope=needs_gradient)
    p_RV, log_z_R = probabilities(logits_RV)
    picked_R = logits_RV.gather(1, labels_R[:, None]).squeeze(1)
    torch.sub(log_z_R, (1 - smoothing) * picked_R, out=loss_R)
    if smoothing:
        loss_R.sub_(smoothing * logits_RV.mean(dim=-1))
    if not needs_gradient:
        return None
    if smoothing:
        p_RV.sub_(smoothing / logits_RV.shape[1])
    p_RV.scatter_add_(1, labels_R[:, None], torch.full_like(picked_R, smoothing - 1)[:, None])
    return p_RV if slope_RV is None else p_RV.mul_(slope_RV)
