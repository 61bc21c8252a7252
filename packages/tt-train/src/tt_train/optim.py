"""Optimizers by name, and the learning rate as a pure function of the step."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from tt_train.config import OptimizerSection, ScheduleSection
from tt_train.errors import ConfigError
from tt_train.registry import OPTIMIZERS, resolve


def make_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer that ``section`` names, over ``groups`` of parameters; torch's fused kernels where it has them."""
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


def learning_rate(section: ScheduleSection, *, base: float, step: int, steps_total: int) -> float:
    """The learning rate of ``step`` (counted from 0), by the rules of transformers' get_scheduler.

    Warm-up rises from 0 at step 0 to ``base`` at step ``warmup_steps``; then it stays, or falls to
    ``min_lr_ratio * base`` at ``steps_total`` along a line or half a cosine.
    """
    warmup = section.warmup_steps
    if step < warmup:
        return base * step / warmup
    if section.name == "constant":
        return base
    progress = min(1.0, (step - warmup) / max(1, steps_total - warmup))
    falling = 1 - progress if section.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return base * (section.min_lr_ratio + (1 - section.min_lr_ratio) * falling)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the learning rate ``value``, times the group's ``lr_scale`` where it has one (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors: ``<parameter name>/<entry>``."""
    return {
        f"{name}/{entry}": value
        for parameter, name in names.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer_tensors_(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], names: dict[torch.nn.Parameter, str]
) -> None:
    """The inverse of ``optimizer_tensors``; raises ValueError where the parameters are not the saved ones."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in by_name:
            raise ValueError(f"the checkpoint has optimizer state for {name!r}, which this run does not train")
        parameter = by_name[name]
        # copied: a mapped file must not be written into; a scalar (step) stays where torch keeps it
        moved = value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
        optimizer.state[parameter][entry] = moved
