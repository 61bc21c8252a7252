"""The model that preference losses compare with, and the figures of a whole step: what is known before its gradients.

Every pass of the reference takes the way of the policy's (the same kernels, the same chunks) without dropout, so that a
policy that has learnt nothing has log-ratios of exactly 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

import tt_models
import tt_peft
from tt_train.config import PreferenceSection
from tt_train.devices.distributed import world
from tt_train.devices.sharding import reshard_
from tt_train.errors import TrainingError
from tt_train.evaluate import evaluating
from tt_train.losses.answers import answers_of, trained_tokens
from tt_train.losses.cross_entropy import Batch

START = "reference"  # the name of a frozen copy of an adapter that does not start at its base


class Reference(Protocol):
    """What a policy is compared with."""

    def __call__(self, batch: Batch, side: str = "") -> Tensor:
        """[A]: the sums of log-probabilities of the answers of a batch; ``kl_``: of the mismatched ones."""


def log_probs_of(
    model: tt_models.Decoder, switched: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext
) -> Reference:
    """A model as it is; or as it is inside ``switched(model)``."""

    def log_probs(batch: Batch, side: str = "") -> Tensor:
        # not under no_grad, where blocks may use other kernels: nothing that trains is in this pass
        with _without_dropout(model), switched(model):
            found = answers_of(model, batch, side=side).log_probs
        if found.requires_grad:
            raise TrainingError(
                "loss: other weights than the adapter's train, so the model without its adapter is not the one that "
                "training started from; train them by adapter.modules_to_save, which keeps their start"
            )
        return found

    return log_probs


def adapter_off(model: tt_models.Decoder) -> Reference:
    """The base of an adapted model, or the adapter that training started from if the model keeps it as ``START``."""
    kept = START in tt_peft.adapter_names(model)
    return log_probs_of(model, (lambda m: tt_peft.use_adapter(m, START)) if kept else tt_peft.disable_adapter)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        reshard_(model)


def prepared(
    batches: Sequence[Batch], *, model: tt_models.Decoder, loss: PreferenceSection, reference: Reference | None
) -> list[Batch]:
    """The micro-batches of a step (or of all held-out rows) with what an objective needs to know of them as a whole.

    ``reference_log_probs`` [A], unless the rows brought them along; ``items_per_token``: pairs (or judged answers) for
    each trained token of a chosen answer; of judged answers the ``desirable_share`` and the divergence ``kl``; for
    kto_pair ``kl_chosen`` and ``kl_rejected``. All but the first are numbers over all batches and ranks.
    """
    batches = [dict(batch) for batch in batches]
    for batch in batches if reference is not None else ():
        assert reference is not None
        if "reference_log_probs" not in batch:
            batch["reference_log_probs"] = reference(batch, "")
    judged = "desirable" in batches[0]
    sums = [
        _sums_of_judged(model, batch, reference) if judged else _sums_of_pairs(model, batch, loss) for batch in batches
    ]
    items, tokens, first, second, of_first = world().sum(torch.stack(sums).sum(dim=0))
    figures = {"items_per_token": items / tokens}
    if judged:
        figures |= {"desirable_share": first / items, "kl": (second / of_first.clamp(min=1)).clamp(min=0)}
    elif loss.name == "kto_pair":
        figures |= {"kl_chosen": (first / items).clamp(min=0), "kl_rejected": (second / items).clamp(min=0)}
    return [batch | figures for batch in batches]


def _sums_of_pairs(model: tt_models.Decoder, batch: Batch, loss: PreferenceSection) -> Tensor:
    """[pairs, chosen tokens, log-ratios of chosen answers, of rejected ones, 0]; the last three are kto_pair's."""
    tokens = trained_tokens(batch)
    whole = (tokens[0::2] > 0) & (tokens[1::2] > 0)
    sums = [whole.sum(), tokens[0::2][whole].sum()]
    if loss.name == "kto_pair":
        with evaluating(model):
            ratios = answers_of(model, batch).log_probs - batch["reference_log_probs"]
        sums += [ratios[0::2][whole].sum(), ratios[1::2][whole].sum()]
    return _vector(sums, tokens)


def _sums_of_judged(model: tt_models.Decoder, batch: Batch, reference: Reference | None) -> Tensor:
    """[answers, desirable tokens, desirable answers, log-ratios of mismatched answers, the number of those]."""
    tokens, desirable = trained_tokens(batch), batch["desirable"]
    sums = [(tokens > 0).sum(), tokens[desirable].sum(), (tokens[desirable] > 0).sum()]
    if "kl_input_ids" in batch:  # a single row in all has no other answer
        with evaluating(model):
            mismatched = answers_of(model, batch, side="kl_")
            known = batch.get("kl_reference_log_probs")
            if known is None:
                assert reference is not None
                known = reference(batch, "kl_")
            ratios = mismatched.log_probs - known
        trained = mismatched.tokens > 0
        sums += [ratios[trained].sum(), trained.sum()]
    return _vector(sums, tokens)


def _vector(sums: Sequence[Tensor], like: Tensor) -> Tensor:
    """Five numbers."""
    zero = torch.zeros((), device=like.device)
    return torch.stack([*(each.float() for each in sums), *[zero] * (5 - len(sums))])
