"""The shared step: forward and backward over micro-batches, one division by the global count, clipping, update."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tt_train.devices.distributed import World, world
from tt_train.devices.sharding import add_up_gradients_, is_sharded, local, reduce_gradients_, squared_norm
from tt_train.errors import TrainingError
from tt_train.losses.cross_entropy import Batch, CausalLM, Objective, Summed
from tt_train.optim.master_weights import InBackward, MasterWeights


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
    ranks: tuple[int, ...] = ()  # those whose own loss was not finite
    half_done: bool = False  # ``not_finite``, after other parameters were updated in the backward pass


def train_step(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    objective: Objective,
    optimizer: torch.optim.Optimizer | MasterWeights,
    *,
    max_grad_norm: float | None = None,
) -> StepResult:
    """One optimizer step over all micro-batches of all ranks, as if they were one batch.

    Gradients of *sums* are accumulated and divided once by the number of summed items, so that the step is the same
    however its rows are split over micro-batches and ranks. The update is not made if the loss or a gradient is not
    finite on any rank. Every rank calls this with the same number of micro-batches, of which some may be empty. An
    ``InBackward`` optimizer is given one micro-batch, and makes its updates in the backward pass.

    Raises:
        TrainingError: the objective does not return Summed, or depends on no trained parameter.
    """
    if isinstance(optimizer, InBackward):
        return _step_in_backward(model, micro_batches, objective, optimizer, max_grad_norm)
    here, sharded = world(), is_sharded(model)
    parts = _backward(model, micro_batches, objective, here)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if here.size > 1 and not sharded:
        add_up_gradients_(trained, here)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    loss = float(torch.stack([part.loss for part in parts]).sum()) if parts else 0.0
    total = agree(parts, here, loss=loss, square=squared_norm(gradients, here.size))
    if not total.count:
        optimizer.zero_grad(set_to_none=True)
        return StepResult(outcome="empty")
    if not gradients:
        raise TrainingError("loss: depends on no trained parameter, so no step can lower it")
    average = here.size if sharded else 1  # FSDP gives the mean over the ranks of what is to be added up
    norm = math.sqrt(total.square) * average / total.count
    finite = math.isfinite(total.loss) and math.isfinite(norm)
    if finite:
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale * average / total.count)
        optimizer.step()
    culprits = [] if finite else here.gather((math.isfinite(loss), _first_nonfinite_gradient(model)))
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        outcome="updated" if finite else "not_finite",
        loss=total.loss / total.count,
        grad_norm=norm,
        tokens=total.tokens,
        metrics=total.means,
        first_nonfinite=next((name for _, name in culprits if name is not None), None),
        ranks=tuple(rank for rank, (is_finite, _) in enumerate(culprits) if not is_finite),
    )


def _backward(model: CausalLM, micro_batches: Sequence[Batch], objective: Objective, here: World) -> list[Summed]:
    """Forward and backward over the micro-batches; gradients of a sharded model are reduced after the last.

    Several ranks pass through empty micro-batches too, since the passes of a sharded model are collectives.
    """
    parts: list[Summed] = []
    for index, batch in enumerate(micro_batches):
        reduce_gradients_(model, last=index + 1 == len(micro_batches))
        part = summed(objective, model, batch)
        if not part.count and here.size == 1:
            continue
        if part.count or part.loss.requires_grad:
            part.loss.backward()  # type: ignore[no-untyped-call]
        elif is_sharded(model):
            raise TrainingError(
                "loss: of a micro-batch with nothing to train on, it does not depend on the model; let the model run "
                "and return a sum over nothing, since all ranks must make the same passes"
            )
        figures = {name: value.detach() for name, value in part.metrics.items()}  # without their graph
        parts.append(part._replace(loss=part.loss.detach(), metrics=figures))
    return parts


@dataclass(frozen=True, kw_only=True)
class Total:
    """Sums over the micro-batches of all ranks, and the means of the metrics."""

    loss: float
    count: int
    tokens: int
    square: float
    means: Mapping[str, float]


def agree(parts: Sequence[Summed], here: World, *, loss: float, square: float = 0.0) -> Total:
    """Add up what the ranks have: one small reduction, and another if the objective names metrics.

    loss, square: this rank's sum of the losses of ``parts``, and its share of the squared norm of the gradients.
    """
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    names = sorted(sums)
    mark = zlib.crc32("\n".join(names).encode())
    count, tokens = sum(part.count for part in parts), sum(part.tokens for part in parts)
    numbers: list[float] = [loss, square, count, tokens, mark]
    if here.size > 1:
        numbers = here.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        if numbers[-1] != mark * here.size:
            raise TrainingError("loss: names different metrics on different ranks; name the same for every micro-batch")
        if names:
            added = here.sum(torch.tensor([sums[name] for name in names], dtype=torch.float64)).tolist()
            sums |= dict(zip(names, added, strict=True))  # in the order in which the objective names them
    loss, square, items = numbers[0], numbers[1], int(numbers[2])
    means = {name: value / items for name, value in sums.items()} if items else {}
    return Total(loss=loss, square=square, count=items, tokens=int(numbers[3]), means=means)


def _step_in_backward(
    model: CausalLM,
    micro_batches: Sequence[Batch],
    objective: Objective,
    optimizer: InBackward,
    max_grad_norm: float | None,
) -> StepResult:
    """``train_step`` of one micro-batch whose backward pass makes the updates; none if the loss is not finite."""
    (batch,) = micro_batches
    here = world()
    part = summed(objective, model, batch)
    loss = float(part.loss.detach())
    total = agree([part], here, loss=loss)
    if not total.count or not math.isfinite(total.loss):
        wrong = here.gather(math.isfinite(loss)) if total.count else []
        return StepResult(
            outcome="not_finite" if total.count else "empty",
            loss=total.loss / total.count if total.count else math.nan,
            ranks=tuple(rank for rank, is_finite in enumerate(wrong) if not is_finite),
        )
    with optimizer.updating((here.size if is_sharded(model) else 1) / total.count, max_grad_norm) as backward:
        part.loss.backward()  # type: ignore[no-untyped-call]
    if not backward.norms:
        raise TrainingError("loss: depends on no trained parameter, so no step can lower it")
    culprit = backward.culprit
    return StepResult(
        outcome="updated" if culprit is None else "not_finite",
        loss=total.loss / total.count,
        grad_norm=math.hypot(*backward.norms),
        tokens=total.tokens,
        metrics=total.means,
        first_nonfinite=next((name for name, parameter in model.named_parameters() if parameter is culprit), None),
        half_done=optimizer.half_done,
    )


def summed(objective: Objective, model: CausalLM, batch: Batch) -> Summed:
    """``objective(model, batch)``; TrainingError if that is not Summed."""
    part: object = objective(model, batch)
    if not isinstance(part, Summed):
        found = f"the objective returned {type(part).__name__}"
        raise TrainingError(f"loss: {found}; return tt_train.Summed(loss, count, tokens), sums over the micro-batch")
    return part


def _first_nonfinite_gradient(model: CausalLM) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
            return name
    return None
