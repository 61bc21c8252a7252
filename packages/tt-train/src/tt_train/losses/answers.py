"""From a batch of answers to their log-probabilities, and from these to an objective: sums that the step divides.

Shapes: R rows of S tokens, A answers of a micro-batch, P pairs of them. Rows may be packed: ``answer_ids`` [R, S] says
whose token is whose (``tt_data.batching.collate``).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_train.losses.cross_entropy import IGNORE, Batch, CausalLM, Summed
from tt_train.losses.log_probs import token_log_probs
from tt_train.losses.preferences import Judged, Pairs, rewards


class Answers(NamedTuple):
    """Of each answer, [A]: the sum of its trained tokens' log-probabilities (differentiable), the number of those
    tokens, and the mean of their logits over tokens and vocabulary."""

    log_probs: Tensor
    tokens: Tensor
    logits: Tensor

    def take(self, chosen: Tensor | slice) -> "Answers":
        """Some of them."""
        return Answers(*(values[chosen] for values in self))


def answers_of(model: CausalLM, batch: Batch, *, side: str = "") -> Answers:
    """What ``model`` gives the answers of a batch, or the mismatched ones (``side="kl_"``) of judged rows."""
    own_AN, keep = _own(batch, side)
    position_ids = batch.get(f"{side}position_ids")
    hidden_ND = model.hidden_states(batch[f"{side}input_ids"], position_ids=position_ids, keep=keep)
    log_probs_N, logits_N = token_log_probs(model, hidden_ND, _next(batch[f"{side}labels"])[keep])
    tokens = own_AN.sum(dim=1)
    # a sum of each row: on a GPU, index_add would add in another order each time
    sums = [torch.where(own_AN, values_N, 0.0).sum(dim=1) for values_N in (log_probs_N, logits_N)]
    return Answers(sums[0], tokens, sums[1] / tokens.clamp(min=1))


def trained_tokens(batch: Batch) -> Tensor:
    """The number of trained tokens of each answer, [A]."""
    return _own(batch, "")[0].sum(dim=1)


def _own(batch: Batch, side: str) -> tuple[Tensor, Tensor]:
    """Whether each of the N trained tokens is of each answer, [A, N]; where the tokens before them are, [R, S]."""
    keep, ids = _next(batch[f"{side}labels"]) != IGNORE, batch[f"{side}answer_ids"]
    judged = batch.get("desirable")
    number = len(judged) if judged is not None else int(ids.max()) // 2 * 2 + 2  # -1: none
    return _next(ids)[keep] == torch.arange(number, device=ids.device)[:, None], keep


def _next(of_RS: Tensor) -> Tensor:
    """What each token predicts, and nothing for the last one of a row."""
    return F.pad(of_RS[:, 1:], (0, 1), value=IGNORE)


def pair_objective(
    model: CausalLM, batch: Batch, *, loss: Callable[[Pairs], Tensor], beta: float, sft_weight: float = 0.0
) -> Summed:
    """``loss`` of each pair with a trained token in both answers, and ``sft_weight`` times the cross entropy of the
    chosen ones: a mean over their tokens in the whole step, of which the batch brings ``items_per_token``.

    Rewards are those of ``tt_train.losses.preferences.rewards``.
    """
    answers = answers_of(model, batch)
    chosen, rejected = answers.take(slice(0, None, 2)), answers.take(slice(1, None, 2))
    whole = (chosen.tokens > 0) & (rejected.tokens > 0)
    tokens, (chosen, rejected) = int(answers.tokens.sum()), (chosen.take(whole), rejected.take(whole))
    reference = batch.get("reference_log_probs")
    pairs = Pairs(
        chosen.log_probs, rejected.log_probs, chosen.tokens, rejected.tokens,
        None if reference is None else reference[0::2][whole], None if reference is None else reference[1::2][whole],
        batch.get("kl_chosen"), batch.get("kl_rejected"),
    )  # fmt: skip
    total = loss(pairs).sum()
    good, bad = rewards(pairs, beta)
    metrics = {
        "rewards_chosen": good.sum(), "rewards_rejected": bad.sum(), "rewards_margin": (good - bad).sum(),
        "rewards_accuracy": (good > bad).sum(), "log_probs_chosen": chosen.log_probs.sum(),
        "log_probs_rejected": rejected.log_probs.sum(), "logits_chosen": chosen.logits.sum(),
        "logits_rejected": rejected.logits.sum(),
    }  # fmt: skip
    if sft_weight:
        metrics["sft_loss"] = -chosen.log_probs.sum() * batch["items_per_token"]
        total = total + sft_weight * metrics["sft_loss"]
    return Summed(total, len(pairs.chosen), tokens=tokens, metrics=metrics)


def judged_objective(
    model: CausalLM, batch: Batch, *, loss: Callable[[Judged], Tensor], beta: float, sft_weight: float = 0.0
) -> Summed:
    """As ``pair_objective``, of answers that were judged one by one: ``chosen`` are the desirable ones.

    Means over the desirable answers alone are sums over those of the whole step, of which the batch brings the
    ``desirable_share``.
    """
    answers = answers_of(model, batch)
    trained = answers.tokens > 0
    kept, desirable = answers.take(trained), batch["desirable"][trained]
    judged = Judged(kept.log_probs, batch["reference_log_probs"][trained], desirable, batch["kl"])
    total, share = loss(judged).sum(), batch["desirable_share"]
    reward = beta * (judged.log_probs.detach() - judged.reference)

    def of_both(values: Tensor) -> tuple[Tensor, Tensor]:
        return (values * desirable).sum() / share, (values * ~desirable).sum() / (1 - share)

    found = {"rewards": of_both(reward), "log_probs": of_both(kept.log_probs), "logits": of_both(kept.logits)}
    metrics = {f"{name}_{kind}": value for name, both in found.items()
               for kind, value in zip(("chosen", "rejected"), both, strict=True)}  # fmt: skip
    metrics["rewards_margin"] = metrics["rewards_chosen"] - metrics["rewards_rejected"]
    metrics["rewards_accuracy"] = ((reward > beta * judged.kl) == desirable).sum()
    metrics["kl"] = judged.kl * len(kept.tokens)
    if sft_weight:
        metrics["sft_loss"] = -(kept.log_probs * desirable).sum() * batch["items_per_token"]
        total = total + sft_weight * metrics["sft_loss"]
    return Summed(total, len(kept.tokens), tokens=int(answers.tokens.sum()), metrics=metrics)
