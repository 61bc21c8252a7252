"""Losses over answers of which one is better than another, from the log-probabilities of a policy and a reference.

Shapes: P pairs, A answers. ``c`` and ``r`` are the log-ratios of the chosen and the rejected answer to the reference:
the sum of the policy's log-probabilities over the trained tokens less the reference's. Each function returns a loss for
each pair (or answer) and says what it computes; the objective sums them up.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Sums of log-probabilities over the trained tokens of each answer, [P], and the number of those tokens.

    The references are None for a loss that has none. ``kl_chosen`` and ``kl_rejected`` are what ``kto_pair`` needs:
    the mean log-ratios over all pairs of the step, at least 0, without gradient.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None


class Judged(NamedTuple):
    """Answers that were judged one by one, [A]: sums of log-probabilities, and whether each is ``desirable``.

    kl: the divergence of the policy from the reference, a number for the whole step, at least 0, without gradient.
    """

    log_probs: Tensor
    reference: Tensor
    desirable: Tensor
    kl: Tensor


def log_ratios(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """``c`` and ``r``."""
    if pairs.reference_chosen is None or pairs.reference_rejected is None:
        raise ValueError("this loss needs the log-probabilities of a reference; simpo and orpo do not")
    return pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected


def per_token(pairs: Pairs, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each answer as means."""
    return chosen / pairs.chosen_tokens.clamp(min=1), rejected / pairs.rejected_tokens.clamp(min=1)


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, https://arxiv.org/abs/2305.18290: ``-log sigmoid(beta (c - r))``.

    label_smoothing: the share of pairs that is labelled the wrong way round; conservative DPO.
    """
    c, r = log_ratios(pairs)
    return _smoothed(beta * (c - r), label_smoothing)


def sigmoid_norm(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on log-ratios per token."""
    c, r = per_token(pairs, *log_ratios(pairs))
    return _smoothed(beta * (c - r), label_smoothing)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, unbiased if a share ``label_smoothing`` below 0.5 is the wrong way round: https://arxiv.org/abs/2403.00409."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing of robust must be at least 0 and below 0.5, got {label_smoothing}")
    c, r = log_ratios(pairs)
    right, wrong = -F.logsigmoid(beta * (c - r)), -F.logsigmoid(beta * (r - c))
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """``relu(1 - beta (c - r))``: https://arxiv.org/abs/2305.10425."""
    c, r = log_ratios(pairs)
    return torch.relu(1 - beta * (c - r))


def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """``(c - r - 1 / (2 beta))^2`` on log-ratios per token: https://arxiv.org/abs/2310.12036."""
    c, r = per_token(pairs, *log_ratios(pairs))
    return (c - r - 1 / (2 * beta)) ** 2


def kto_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """The mean of ``1 - sigmoid(beta (c - kl_rejected))`` and ``1 - sigmoid(beta (kl_chosen - r))``.

    torchtune 0.1's, but its divergences pass no gradient on, as in the paper: https://arxiv.org/abs/2402.01306.
    """
    c, r = log_ratios(pairs)
    if pairs.kl_chosen is None or pairs.kl_rejected is None:
        raise ValueError("kto_pair needs kl_chosen and kl_rejected, the mean log-ratios of the step")
    return (torch.sigmoid(beta * (pairs.kl_rejected - c)) + torch.sigmoid(beta * (r - pairs.kl_chosen))) / 2


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """``1 - sigmoid(beta c) + sigmoid(beta r)``: https://arxiv.org/abs/2408.06266."""
    c, r = log_ratios(pairs)
    return torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)


def sppo_hard(pairs: Pairs, *, beta: float) -> Tensor:
    """``(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2``: https://arxiv.org/abs/2405.00675."""
    c, r = log_ratios(pairs)
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def simpo(pairs: Pairs, *, beta: float, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO on the policy's log-probabilities per token, which must differ by ``margin / beta``; it has no reference.

    The paper calls the margin gamma: https://arxiv.org/abs/2405.14734.
    """
    chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
    return _smoothed(beta * (chosen - rejected) - margin, label_smoothing)


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """``-beta log sigmoid`` of the log odds ratio of both answers, per token; it has no reference.

    It is made to be added to an SFT term (``sft_weight`` 1): https://arxiv.org/abs/2403.07691.
    """
    chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
    odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
    return -beta * F.logsigmoid(odds)


def kto(judged: Judged, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """``1 - sigmoid(beta (log-ratio - kl))`` of a desirable answer; of an undesirable one with the opposite sign.

    Answers are judged one by one; the weights make up for many more of one kind: https://arxiv.org/abs/2402.01306.
    """
    gap = judged.log_probs - judged.reference - judged.kl
    return torch.where(
        judged.desirable,
        desirable_weight * torch.sigmoid(-beta * gap),
        undesirable_weight * torch.sigmoid(beta * gap),
    )


def _smoothed(gap: Tensor, label_smoothing: float) -> Tensor:
    loss = -F.logsigmoid(gap)
    return loss if not label_smoothing else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-gap)


def log1mexp(value: Tensor) -> Tensor:
    """``log(1 - exp(value))`` for values at most 0, exact near 0 and far from it, and finite at 0."""
    value = value.clamp(max=-torch.finfo(value.dtype).tiny)
    near = torch.log(-torch.expm1(value.clamp(min=-1)))  # clamped: the branch that is not taken must be finite, too
    return torch.where(value > -math.log(2), near, torch.log1p(-torch.exp(value.clamp(max=-0.5))))


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (sigmoid, sigmoid_norm, robust, hinge, ipo, kto_pair, apo_zero, sppo_hard, simpo, orpo)
}


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A preference loss from sums of log-probabilities over the tokens of each answer, [P] each.

    Args:
        loss_type: sigmoid, sigmoid_norm, robust, hinge, ipo, kto_pair, apo_zero, sppo_hard, simpo or orpo.
        chosen_tokens, rejected_tokens: how many tokens were summed; sigmoid_norm, ipo, simpo and orpo need them.
        options: of the loss: label_smoothing, margin.

    Returns:
        the loss of each pair, and the rewards ``beta (policy - reference)`` of both answers, without gradient. A loss
        without a reference has rewards ``beta`` times the mean log-probability of a token.

    Raises:
        ValueError: an unknown loss, or one that needs what is not given.
    """
    if loss_type not in PAIR_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(PAIR_LOSSES)}, got {loss_type!r}")
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if loss_type in ("sigmoid_norm", "ipo", "simpo", "orpo") and (chosen_tokens is None or rejected_tokens is None):
        raise ValueError(f"{loss_type} is per token: give chosen_tokens and rejected_tokens")
    ones = torch.ones_like(policy_chosen)
    pairs = Pairs(
        policy_chosen, policy_rejected, ones if chosen_tokens is None else chosen_tokens,
        ones if rejected_tokens is None else rejected_tokens, reference_chosen, reference_rejected,
    )  # fmt: skip
    if loss_type == "kto_pair":
        c, r = (ratio.detach().mean().clamp(min=0) for ratio in log_ratios(pairs))
        pairs = pairs._replace(kl_chosen=c, kl_rejected=r)
    chosen = {name: value for name, value in options.items() if value}
    return PAIR_LOSSES[loss_type](pairs, beta=beta, **chosen), *rewards(pairs, beta)


def rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """Of chosen and rejected answers, without gradient, as ``dpo_loss`` says."""
    if pairs.reference_chosen is None:
        chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
    else:
        chosen, rejected = log_ratios(pairs)
    return beta * chosen.detach(), beta * rejected.detach()
