"""Log-probabilities of given tokens under an output projection, without ever holding all logits.

Shapes: N positions (flattened), D hidden size, V vocabulary, C positions of a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_train.losses.cross_entropy import (
    IGNORE,
    CausalLM,
    WeightGradient,
    by_chunks,
    chunk_of,
    differentiable,
    log_sum,
    output_projection,
)


class TokenLogProbs(NamedTuple):
    """Per position, in fp32; 0 at positions whose label is -100."""

    log_probs: Tensor  # differentiable
    mean_logits: Tensor  # the mean over the vocabulary, a figure to watch


def token_log_probs(model: CausalLM, hidden_ND: Tensor, labels_N: Tensor) -> TokenLogProbs:
    """``linear_log_probs`` of the output projection of ``model``, whatever is on it; no label is -100."""
    weight = output_projection(model)
    if weight is not None:
        return linear_log_probs(hidden_ND, weight, labels_N, softcap=model.logit_softcap)
    parts = by_chunks(_of_logits, model, hidden_ND, labels_N)
    return TokenLogProbs(*map(torch.cat, zip(*parts, strict=True)))


def _of_logits(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    return -F.cross_entropy(logits_CV, labels_C, reduction="none"), logits_CV.detach().mean(dim=-1)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, chunk_size: int | None = None
) -> TokenLogProbs:
    """``log_softmax(hidden @ weight.T)`` at ``labels`` in fp32, a chunk of positions at a time.

    If the weight is frozen, the gradient by the hidden state of each position is computed in the forward pass and only
    scaled in the backward pass. If the weight trains, the backward pass computes the logits of each chunk again.

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] the target of each position (not shifted), -100 to ignore.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        chunk_size: positions at a time; by default what keeps the fp32 logits of a chunk under 64 MB.

    Returns:
        two tensors of the shape of ``labels``.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    keep = labels != IGNORE
    found = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        *differentiable(hidden[keep], weight), labels[keep], softcap, chunk_size or chunk_of(weight)
    )
    zeros = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    return TokenLogProbs(*(zeros.masked_scatter(keep, kept) for kept in found))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, ctx.trains = ctx.needs_input_grad[:2]
        log_probs_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        mean_logits_N = torch.empty_like(log_probs_N)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden and not ctx.trains else None
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logits_CV, slope_CV = _logits(hidden_ND[part], weight_VD, softcap, slope=grad_hidden_ND is not None)
            mean_logits_N[part] = logits_CV.mean(dim=-1)
            picked_C = logits_CV.gather(1, labels_N[part, None]).squeeze(1)
            log_z_C = log_sum(logits_CV)
            log_probs_N[part] = picked_C - log_z_C
            if grad_hidden_ND is not None:
                grad_CV = _gradient_(logits_CV, labels_N[part], log_z_C, slope_CV).to(weight_VD.dtype)
                del logits_CV  # before the product, which takes memory of its own
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
                del grad_CV
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.save_for_backward(*((hidden_ND, weight_VD, labels_N) if ctx.trains else (grad_hidden_ND,)))
        ctx.mark_non_differentiable(mean_logits_N)
        return log_probs_N, mean_logits_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trains:
            (grad_hidden_ND,) = ctx.saved_tensors
            return (grad_hidden_ND * grad_N[:, None]).to(grad_hidden_ND.dtype), None, None, None, None
        hidden_ND, weight_VD, labels_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = WeightGradient(weight_VD)
        for start in range(0, len(labels_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_CV, slope_CV = _logits(hidden_ND[part], weight_VD, ctx.softcap, slope=True)
            whole_CV = _gradient_(logits_CV, labels_N[part], log_sum(logits_CV), slope_CV).mul_(grad_N[part, None])
            grad_CV = grad_weight.of_chunk(whole_CV, hidden_ND[part])
            del logits_CV, whole_CV
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
            grad_weight.make_room(ctx.chunk)
        return grad_hidden_ND, grad_weight.total(), None, None, None


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, softcap: float | None, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """In fp32 after the cap, and the slope of the cap if it is asked for."""
    logits_CV = F.linear(hidden_CD, weight_VD).float()
    if not softcap:
        return logits_CV, None
    logits_CV.div_(softcap).tanh_()
    slope_CV = 1 - logits_CV.square() if slope else None
    return logits_CV.mul_(softcap), slope_CV


def _gradient_(logits_CV: Tensor, labels_C: Tensor, log_z_C: Tensor, slope_CV: Tensor | None) -> Tensor:
    """That of the log-probabilities by the logits before the cap, written over the logits."""
    grad_CV = logits_CV.sub_(log_z_C[:, None]).exp_().neg_()
    grad_CV.scatter_add_(1, labels_C[:, None], torch.ones_like(log_z_C)[:, None])
    return grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)
