"""Optimizers by name, and weights that train in fp32 behind bf16."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tt_train.config import OptimizerSection
from tt_train.errors import ConfigError
from tt_train.registry import OPTIMIZERS, resolve

_BUCKET = 2**22  # weights that are whole at a time while the optimizer runs


class MasterWeights:
    """A torch optimizer whose bf16 parameters are the rounding of fp32 weights. fp32 parameters are trained as usual.

    A step of 1e-5 is smaller than half the distance between neighbouring bf16 numbers: added to a bf16 weight it is
    lost. So a trained weight is fp32, kept as two halves: its rounding to bf16, which is the parameter of the model,
    and the 16 bits that the rounding lost. Together they are the fp32 number, bit for bit, for two more bytes per
    weight. Gradients are added up in fp32, the optimizer's state is fp32.

    ``narrow``: fp32 parameters become bf16 ones first, without losing a bit. ``together``: the optimizer sees all
    parameters in one call; else it is called for some of them at a time, so that few are whole at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, narrow: bool = False, together: bool = False) -> None:
        self.optimizer = optimizer
        self.together = together
        self.lost: dict[nn.Parameter, Tensor] = {}
        self.half_done = False  # whether a step has failed with a part of the weights updated
        self.updates = 0  # steps made
        for parameter in self.parameters():
            if parameter.dtype == torch.bfloat16 or (narrow and parameter.dtype == torch.float32):
                self._narrow_(parameter)

    def _narrow_(self, parameter: nn.Parameter) -> None:
        nearest = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
        self.lost[parameter] = torch.empty_like(nearest, dtype=torch.int16)
        split_(parameter.data.to(torch.float32), nearest, self.lost[parameter])
        parameter.data = nearest
        parameter.grad_dtype = torch.float32  # micro-batches are added up there

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """Per parameter, as in the optimizer."""
        return self.optimizer.state

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Update the fp32 weights by the gradients, and round them anew."""
        self.half_done = True
        if not self.lost or self.together:
            with self.whole(self.lost):
                self.optimizer.step()
        else:
            self._step_by_buckets()
        self.half_done, self.updates = False, self.updates + 1

    def _step_by_buckets(self) -> None:
        groups = self.param_groups
        buckets = [(group, bucket) for group in groups for bucket in _buckets(group["params"])]
        scratch = torch.empty(max(_size(bucket) for _, bucket in buckets), device=buckets[0][1][0].device)
        try:
            for group, bucket in buckets:
                self.optimizer.param_groups = [{**group, "params": bucket}]
                with self.whole(bucket, scratch):
                    self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups

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


AnyOptimizer = torch.optim.Optimizer | MasterWeights


def make_optimizer(groups: list[dict[str, Any]], section: OptimizerSection, *, narrow: bool = False) -> MasterWeights:
    """The optimizer that ``section`` names, over ``groups`` of parameters; torch's fused kernels if it has them.

    What it updates is fp32, also behind bf16 parameters. ``narrow``: fp32 parameters become such bf16 ones.
    """
    optimizer = _torch_optimizer(groups, section)
    return MasterWeights(optimizer, narrow=narrow, together=section.name not in OPTIMIZERS)


def decayed(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay as the optimizer says; norms, biases and other vectors do not decay."""
    every = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in every if parameter.dim() > 1]},
        {"params": [parameter for parameter in every if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _torch_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    optimizer_class = resolve(section.name, OPTIMIZERS)
    accepted = inspect.signature(optimizer_class).parameters
    options: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay, "betas": tuple(section.betas),
                               "eps": section.eps, "momentum": section.momentum, "fused": True}  # fmt: skip
    defaults = OptimizerSection()
    for key in ("betas", "eps", "momentum"):
        if key not in accepted and getattr(section, key) != getattr(defaults, key):
            raise ConfigError([f"optimizer.{key}: {section.name} has no {key}; leave it out"])
    chosen = {key: value for key, value in options.items() if key in accepted}
    try:
        return optimizer_class(groups, **chosen)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError):  # a subclass tensor or device without a fused kernel
        chosen.pop("fused", None)
        return optimizer_class(groups, **chosen)  # type: ignore[no-any-return]


def set_learning_rate(optimizer: AnyOptimizer, value: float) -> None:
    """Give every group the learning rate ``value``, times the group's ``lr_scale`` where it has one (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


# ---- the optimizer's state in a checkpoint ----


_STATE_ENTRIES = {"AdamW": 2, "Adam": 2, "Adagrad": 1, "RMSprop": 1, "SGD": 1}


def state_entries(optimizer: MasterWeights) -> int:
    """How many fp32 numbers the optimizer keeps per weight, at most; 2 if it is not one of the registered."""
    return _STATE_ENTRIES.get(type(optimizer.optimizer).__name__, 2)


def optimizer_tensors(optimizer: AnyOptimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors: ``<parameter name>/<entry>``."""
    return {
        f"{name}/{entry}": value
        for parameter, name in names.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors_(
    optimizer: AnyOptimizer, tensors: Mapping[str, Tensor], names: dict[nn.Parameter, str]
) -> None:
    """The inverse of ``optimizer_tensors``; raises ValueError where the parameters are not the saved ones."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in by_name:
            raise ValueError(f"the checkpoint has optimizer state for {name[:200]!r}, which this run does not train")
        parameter = by_name[name]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(f"{entry[:200]!r} of {name} has shape {list(value.shape)}, not {list(parameter.shape)}")
        # copied: a mapped file must not be written into; a scalar (step) stays where torch keeps it
        moved = value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
        optimizer.state[parameter][entry] = moved
