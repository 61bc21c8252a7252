"""Optimizers that update fp32 weights behind bf16 parameters, after the backward pass or while it runs."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt.ranks import is_dtensor
from tt_train.devices.distributed import World, world
from tt_train.devices.sharding import local, squared_norm
from tt_train.errors import TrainingError

_BUCKET = 2**22  # weights that are whole at a time while the optimizer runs


class MasterWeights:
    """Torch optimizers whose bf16 parameters are the rounding of fp32 weights. fp32 parameters are trained as usual.

    A step of 1e-5 is smaller than half the distance between neighbouring bf16 numbers: added to a bf16 weight it is
    lost. So a trained weight is fp32, kept as two halves: its rounding to bf16, which is the parameter of the model,
    and the 16 bits that the rounding lost. Together they are the fp32 number, bit for bit, for two more bytes per
    weight. Gradients are added up in fp32, the optimizer's state is fp32.

    ``narrow``: fp32 parameters become bf16 ones first, without losing a bit. ``together``: an optimizer sees all its
    parameters in one call; else it is called for some of them at a time, so that few are whole at once.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer, narrow: bool = False, together: bool = False) -> None:
        self.optimizers = optimizers
        self.together = together
        self.lost: dict[nn.Parameter, Tensor] = {}
        self.half_done = False  # whether a step has failed with a part of the weights updated
        self.updates = 0  # steps made
        self._at_start = [dict(group) for group in self.param_groups]
        for parameter in self.parameters():
            if parameter.dtype == torch.bfloat16 or (narrow and parameter.dtype == torch.float32):
                self._narrow_(parameter)

    def _narrow_(self, parameter: nn.Parameter) -> None:
        nearest = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
        self.lost[parameter] = torch.empty_like(nearest, dtype=torch.int16)
        split_(parameter.data.to(torch.float32), nearest, self.lost[parameter])
        parameter.data = nearest
        parameter.grad_dtype = torch.float32  # micro-batches are added up there
        for optimizer in self.optimizers:  # Adagrad has a state before its first step
            for key, value in optimizer.state.get(parameter, {}).items():
                if value.dtype == torch.bfloat16:
                    optimizer.state[parameter][key] = value.float()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """Per parameter, as in the optimizers; a parameter that has not been updated is not there."""
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def counted(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each group, with the numbers in it that steps have changed: some optimizers count there. Not its rate."""
        for group, before in zip(self.param_groups, self._at_start, strict=True):
            yield group, {key: value for key, value in group.items()
                          if isinstance(value, int | float) and key != "lr" and value != before.get(key)}  # fmt: skip

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Update the fp32 weights by the gradients, and round them anew."""
        self.half_done = True
        for optimizer in self.optimizers:
            if not self.lost or self.together:
                with self.whole(self.lost):
                    call(optimizer)
            else:
                self._step_by_buckets(optimizer)
        self.half_done, self.updates = False, self.updates + 1

    def _step_by_buckets(self, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        buckets = [(group, bucket) for group in groups for bucket in _buckets(group["params"])]
        scratch = torch.empty(max(_size(bucket) for _, bucket in buckets), device=buckets[0][1][0].device)
        try:
            for group, bucket in buckets:
                optimizer.param_groups = [{**group, "params": bucket}]
                with self.whole(bucket, scratch):
                    call(optimizer)
        finally:
            optimizer.param_groups = groups

    @contextmanager
    def whole(self, parameters: Iterable[nn.Parameter], scratch: Tensor | None = None) -> Iterator[None]:
        """Inside, these parameters are their fp32 weights (in ``scratch``); what is written into them is kept."""
        rounded = {parameter: parameter.data for parameter in parameters if parameter in self.lost}
        try:
            for parameter, nearest in rounded.items():
                out = None if scratch is None else scratch[: nearest.numel()].view(nearest.shape)
                scratch = None if scratch is None else scratch[nearest.numel() :]
                parameter.data = join(nearest, self.lost[parameter], out=out)
            yield
        finally:
            for parameter, nearest in rounded.items():
                if parameter.dtype == torch.float32:
                    split_(parameter.data, nearest, self.lost[parameter])
                    parameter.data = nearest


def call(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``. torchao compiles the steps of its optimizers; on a CPU that would need a C++ compiler."""
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    eager = on_cpu and type(optimizer).__module__.startswith("torchao.")
    with torch.compiler.set_stance("force_eager") if eager else nullcontext():
        optimizer.step()


@dataclass
class Backward:
    """A step that is made while its backward pass runs: what became of it so far."""

    scale: float  # of the gradients of a sum, to make them those of a mean
    max_grad_norm: float | None  # of each parameter
    norms: list[float] = field(default_factory=list)  # of the gradients of the mean, before clipping
    culprit: nn.Parameter | None = None  # the first with a gradient that is not finite


class InBackward(MasterWeights):
    """An optimizer for each parameter, which updates it and frees its gradient as soon as the gradient is whole.

    So only a few gradients exist at a time: 4 bytes less per trained weight. The updates are those of
    ``MasterWeights``. The norm over all gradients is known too late to clip by it: ``max_grad_norm`` is that of each
    parameter. If a gradient is not finite, its parameter and those after it are left alone, but those before it are
    updated already: ``half_done`` then says that the weights are those of no step.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer, narrow: bool = False) -> None:
        super().__init__(*optimizers, narrow=narrow)
        self._backward: Backward | None = None
        for optimizer in optimizers:
            (parameter,) = (parameter for group in optimizer.param_groups for parameter in group["params"])
            parameter.register_post_accumulate_grad_hook(partial(self._update, optimizer))

    @contextmanager
    def updating(self, scale: float, max_grad_norm: float | None) -> Iterator[Backward]:
        """Inside, a backward pass makes a step, by its gradients times ``scale``. Shards make it on all ranks."""
        self._backward = Backward(scale, max_grad_norm)
        try:
            yield self._backward
            if self._backward.culprit is None:
                self.half_done, self.updates = False, self.updates + 1
        finally:
            self._backward = None

    def _update(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        now, gradient = self._backward, parameter.grad
        if now is None or gradient is None:  # somebody else's backward pass, which adds gradients up
            return
        here = world()
        if here.size > 1 and not is_dtensor(gradient):
            self._add_up_(gradient, parameter, here)
        square = torch.tensor(squared_norm([gradient], here.size), dtype=torch.float64)
        norm = math.sqrt(float(here.sum(square))) * now.scale
        now.norms.append(norm)
        if now.culprit is None and not math.isfinite(norm):
            now.culprit = parameter
        elif now.culprit is None:
            clip = 1.0 if now.max_grad_norm is None else min(1.0, now.max_grad_norm / (norm + 1e-6))
            local(gradient).mul_(clip * now.scale)
            self.half_done = True
            with self.whole([parameter]):
                call(optimizer)
        parameter.grad = None

    def _add_up_(self, gradient: Tensor, parameter: nn.Parameter, here: World) -> None:
        """Give every rank the sum of all ranks' gradients of a parameter that is whole on each."""
        number = next(index for index, each in enumerate(self.parameters()) if each is parameter)
        total = here.sum(torch.cat([gradient.reshape(-1).float(), gradient.new_tensor([number], dtype=torch.float32)]))
        if float(total[-1]) != number * here.size:
            raise TrainingError(
                "optimizer_in_backward: gradients become complete in another order on another rank; use the same model "
                "on all, or leave it out"
            )
        gradient.copy_(total[:-1].view(gradient.shape))


def scratch_bytes(parameters: Iterable[nn.Parameter], *, together: bool) -> int:
    """What ``MasterWeights.step`` takes while it runs: the fp32 weights that are whole at a time, and the bits that one
    of them lacked, which torch widens to add them."""
    narrow = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
    whole = _size(narrow) if together else max(map(_size, _buckets(narrow)), default=0)
    return 4 * (whole + max((parameter.numel() for parameter in narrow), default=0))


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and _size([*bucket, parameter]) > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def split_(whole: Tensor, nearest: Tensor, lost: Tensor) -> None:
    """Write fp32 weights into ``nearest`` (bf16) and ``lost`` (int16). ``whole`` is used up."""
    bits = whole.view(torch.int32)
    lost.copy_(bits)  # the lower half as a signed number, which undoes the rounding of the upper half
    nearest.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def join(nearest: Tensor, lost: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The fp32 weights that ``split_`` was given."""
    whole = torch.empty_like(nearest, dtype=torch.float32) if out is None else out
    whole.copy_(nearest).view(torch.int32).add_(lost)
    return whole
