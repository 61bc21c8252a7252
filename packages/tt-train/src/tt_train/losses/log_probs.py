"""Log-probabilities of given tokens under an output projection, without ever holding all logits.

Shapes: N positions (flattened), D hidden size, V vocabulary, C positions of a chunk, R of a block of its rows.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_train.losses.chunks import WeightGradient, by_rows_, cap_, chunks, differentiable, multiply_, probabilities
from tt_train.losses.cross_entropy import IGNORE, CausalLM, by_chunks, output_projection


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
    scaled in the backward pass. If the weight trains, logits of up to twice its size are kept for the backward pass,
    which computes those of the other positions again.

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] the target of each position (not shifted), -100 to ignore.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        chunk_size: positions at a time; by default what keeps the logits of a chunk under 64 MB (128 MB if a weight in
            bf16 trains).

    Returns:
        two tensors of the shape of ``labels``.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    keep = labels != IGNORE
    found = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        *differentiable(hidden[keep], weight), labels[keep], softcap, chunk_size
    )
    zeros = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    return TokenLogProbs(*(zeros.masked_scatter(keep, kept) for kept in found))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float | None, size: int | None
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, ctx.trains = ctx.needs_input_grad[:2]
        log_probs_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        mean_logits_N = torch.empty_like(log_probs_N)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden and not ctx.trains else None
        formula = partial(_log_probs, softcap=softcap, needs_gradient=grad_hidden_ND is not None)
        ctx.softcap, ctx.size = softcap, size
        ctx.kept = {} if ctx.trains else None
        for part, logits_CV in chunks(hidden_ND, weight_VD, size=size, trains=ctx.trains, keep=ctx.kept):
            by_rows_(formula, logits_CV, labels_N[part], log_probs_N[part], mean_logits_N[part])
            if grad_hidden_ND is not None:
                multiply_(grad_hidden_ND[part], logits_CV, weight_VD)
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
        formula = partial(_gradient, softcap=ctx.softcap)
        for part, logits_CV in chunks(hidden_ND, weight_VD, size=ctx.size, trains=True, kept=ctx.kept):
            by_rows_(formula, logits_CV, labels_N[part], grad_N[part])
            grad_weight.add(logits_CV, hidden_ND[part])
            if grad_hidden_ND is not None:
                multiply_(grad_hidden_ND[part], logits_CV, weight_VD)
        return grad_hidden_ND, grad_weight.total(), None, None, None


def _log_probs(
    logits_RV: Tensor,
    labels_R: Tensor,
    log_probs_R: Tensor,
    mean_R: Tensor,
    *,
    softcap: float | None,
    needs_gradient: bool,
) -> Tensor | None:
    """Write both results; returns the gradient of the log-probabilities, if it is needed. Else the logits stay."""
    logits_RV = logits_RV.clone() if softcap and not needs_gradient else logits_RV
    slope_RV = cap_(logits_RV, softcap, slope=needs_gradient)
    torch.mean(logits_RV, dim=-1, out=mean_R)
    picked_R = logits_RV.gather(1, labels_R[:, None]).squeeze(1)
    p_RV, log_z_R = probabilities(logits_RV)
    torch.sub(picked_R, log_z_R, out=log_probs_R)
    return _differentiated_(p_RV, labels_R, slope_RV) if needs_gradient else None


def _gradient(logits_RV: Tensor, labels_R: Tensor, grad_R: Tensor, *, softcap: float | None) -> Tensor:
    """That of the loss; ``grad_R`` is that by the log-probabilities."""
    slope_RV = cap_(logits_RV, softcap, slope=True)
    return _differentiated_(logits_RV.softmax(dim=-1), labels_R, slope_RV).mul_(grad_R[:, None])


def _differentiated_(p_RV: Tensor, labels_R: Tensor, slope_RV: Tensor | None) -> Tensor:
    """The gradient of the log-probabilities by the logits before the cap, in the memory of the probabilities."""
    p_RV.neg_().scatter_add_(1, labels_R[:, None], torch.ones_like(p_RV[:, :1]))
    return p_RV if slope_RV is None else p_RV.mul_(slope_RV)
