"""The shared step: forward and backward over micro-batches, one division by the global count, clipping, update."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tt_train.errors import TrainingError
from tt_train.losses import Batch, CausalLM, Objective, Summed
from tt_train.optim import MasterWeights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of a step.

    outcome: ``updated``; ``empty`` if no row had anything to train on, which is not an error; ``not_finite`` if the
    loss or a gradient was not, so that the update was not made. loss: the mean over the objective's count, nan if
    ``empty``. grad_norm: before clipping. tokens: trained tokens. metrics: the means of what the objective names.
    """

    outcome: Literal["updated", "empty", "not_finite"]
    loss: float = math.nan
    grad_norm: float = math.nan
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    first_nonfinite: str | None = None  # the first parameter with a gradient that is not finite


def train_step(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    objective: Objective,
    optimizer: torch.optim.Optimizer | MasterWeights,
    *,
    max_grad_norm: float | None = None,
) -> StepResult:
    """One optimizer step over all micro-batches, as if they were one batch.

    Gradients of *sums* are accumulated and divided once by the number of summed items, so that the step is the same
    however its rows are split. The update is not made if the loss or a gradient is not finite.

    Raises:
        TrainingError: the objective does not return Summed, or depends on no trained parameter.
    """
    parts: list[Summed] = []
    for batch in micro_batches:
        part = summed(objective, model, batch)
        if part.count:
            part.loss.backward()  # type: ignore[no-untyped-call]
            figures = {name: value.detach() for name, value in part.metrics.items()}  # without their graph
            parts.append(part._replace(loss=part.loss.detach(), metrics=figures))
    if not parts:
        optimizer.zero_grad(set_to_none=True)
        return StepResult(outcome="empty")
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if not gradients:
        raise TrainingError("loss: depends on no trained parameter, so no step can lower it")
    count = sum(part.count for part in parts)
    total = float(torch.stack([part.loss for part in parts]).sum())
    norm = float(torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)) / count
    finite = math.isfinite(total) and math.isfinite(norm)
    if finite:
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        torch._foreach_mul_(gradients, scale / count)
        optimizer.step()
    culprit = None if finite else _first_nonfinite_gradient(model)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        outcome="updated" if finite else "not_finite",
        loss=total / count,
        grad_norm=norm,
        tokens=sum(part.tokens for part in parts),
        metrics=mean_metrics(parts),
        first_nonfinite=culprit,
    )


def summed(objective: Objective, model: CausalLM, batch: Batch) -> Summed:
    """``objective(model, batch)``; TrainingError if that is not Summed."""
    part: object = objective(model, batch)
    if not isinstance(part, Summed):
        found = f"the objective returned {type(part).__name__}"
        raise TrainingError(f"loss: {found}; return tt_train.Summed(loss, count, tokens), sums over the micro-batch")
    return part


def mean_metrics(parts: Iterable[Summed]) -> dict[str, float]:
    """The means of the metrics that an objective names, over all that it counted."""
    sums: dict[str, float] = {}
    count = 0
    for part in parts:
        count += part.count
        for name, value in part.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / count for name, value in sums.items()}


def _first_nonfinite_gradient(model: CausalLM) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None
