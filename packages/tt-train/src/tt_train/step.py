"""The shared step: forward and backward over micro-batches, one division by the global count, clipping, update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tt_train.losses import Objective
from tt_train.master_weights import MasterWeights


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over ``tokens`` trained tokens. ``updated``: False where it was not finite, so not made."""

    loss: float
    grad_norm: float
    tokens: int
    updated: bool
    first_nonfinite: str | None = None  # the parameter whose gradient was the first that is not finite


def train_step(
    model: nn.Module,
    micro_batches: Sequence[dict[str, Tensor]],
    objective: Objective,
    optimizer: torch.optim.Optimizer | MasterWeights,
    *,
    max_grad_norm: float | None = None,
) -> StepResult:
    """One optimizer step over all micro-batches, as if they were one batch.

    Gradients of *sums* are accumulated and divided once by the number of summed items, so that the step is the same
    however the rows are split. The update is not made where the loss or a gradient is not finite.
    """
    totals: list[Tensor] = []
    count = 0
    for batch in micro_batches:
        loss_sum, number = objective(model, batch)
        if number:
            loss_sum.backward()  # type: ignore[no-untyped-call]
            totals.append(loss_sum.detach())
            count += number
    parameters = [
        parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None
    ]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not count or not gradients:
        optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=float("nan"), grad_norm=float("nan"), tokens=0, updated=False)
    total = float(torch.stack(totals).sum())
    norm = float(torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)) / count
    finite = math.isfinite(total) and math.isfinite(norm)
    if finite:
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        torch._foreach_mul_(gradients, scale / count)
        optimizer.step()
    culprit = None if finite else _first_nonfinite_gradient(model)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=total / count, grad_norm=norm, tokens=count, updated=finite, first_nonfinite=culprit)


def _first_nonfinite_gradient(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None
