"""Optimizers by name."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt.ranks import is_dtensor
from tt_train.config import OptimizerSection
from tt_train.errors import ConfigError, did_you_mean
from tt_train.optim.master_weights import InBackward, MasterWeights
from tt_train.quantized.torchao import quietly
from tt_train.settings.keys.wrong_type import shown
from tt_train.settings.registry import OPTIMIZERS, resolve

HIDDEN = "hidden_matrices"  # in a group of parameters: whether they are what ``muon`` is for
AnyOptimizer = torch.optim.Optimizer | MasterWeights


def make_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection, *, narrow: bool = False, in_backward: bool = False
) -> MasterWeights:
    """The optimizer that ``section`` names, over ``groups`` of parameters; torch's fused kernels if it has them.

    What it updates is fp32, also behind bf16 parameters. ``narrow``: fp32 parameters become such bf16 ones.
    ``in_backward``: each parameter is updated while the backward pass runs.
    """
    if in_backward:
        each = [[{**group, "params": [parameter]}] for group in groups for parameter in group["params"]]
        return InBackward(*(made for one in each for made in _torch_optimizers(one, section)), narrow=narrow)
    return MasterWeights(*_torch_optimizers(groups, section), narrow=narrow, together=section.name not in OPTIMIZERS)


def decayed(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay as the optimizer says; norms, biases and other vectors do not decay."""
    every = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in every if parameter.dim() > 1]},
        {"params": [parameter for parameter in every if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _torch_optimizers(groups: list[dict[str, Any]], section: OptimizerSection) -> list[torch.optim.Optimizer]:
    """One optimizer; for ``muon`` another one, AdamW, for what is not a matrix of a block."""
    if section.name != "muon":
        return [_torch_optimizer(groups, section)]
    hidden = [group for group in groups if group.get(HIDDEN, group["params"][0].dim() == 2)]
    rest = [group for group in groups if not any(group is other for other in hidden)]
    plain = OptimizerSection()
    options = {"adjust_lr_fn": "match_rms_adamw", **section.options}
    muon = replace(section, betas=plain.betas, eps=plain.eps, options=options)
    adamw = replace(section, name="adamw", momentum=plain.momentum, options={})
    return [_torch_optimizer(part, own) for part, own in ((hidden, muon), (rest, adamw)) if part]


def _torch_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    optimizer_class = _resolved(section.name)
    accepted = inspect.signature(optimizer_class).parameters
    chosen: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay, "betas": tuple(section.betas),
                              "eps": section.eps, "momentum": section.momentum, "fused": True}  # fmt: skip
    defaults = OptimizerSection()
    for key in ("betas", "eps", "momentum"):
        if key not in accepted and getattr(section, key) != getattr(defaults, key):
            raise ConfigError([f"optimizer.{key}: {section.name} has no {key}; leave it out"])
    if section.name == "muon":  # whose numbers of these names are others
        del chosen["eps"]
        chosen = {key: value for key, value in chosen.items() if key != "momentum" or value}
    if section.name not in ("adamw", "adam") and any(is_dtensor(each) for group in groups for each in group["params"]):
        del chosen["fused"]  # torch has no such kernel of others for shards
    chosen = {key: value for key, value in chosen.items() if key in accepted}
    if wrong := _wrong_options(section, accepted):
        raise ConfigError(wrong)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in section.options.items()}
    try:  # with copies: a constructor that fails may have written what it was given into the groups
        return optimizer_class([dict(group) for group in groups], **chosen | given)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, ValueError):  # a subclass tensor, a device or an option without a fused kernel
        if "fused" not in chosen or "fused" in given:
            raise
        del chosen["fused"]
        return optimizer_class(groups, **chosen | given)  # type: ignore[no-any-return]


def _resolved(name: str) -> Any:
    with quietly():
        found = resolve(name, OPTIMIZERS)
    return _eager(found) if found.__module__.startswith("torch.optim.") else found


@functools.cache
def _eager(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimizer without the wrappers that its methods have for torch.compile, which nobody asks of it here.

    They import torch._dynamo, and sympy with it: about 700 modules before the first step.
    """
    bare_step = inspect.unwrap(optimizer_class.step)

    def step(self: torch.optim.Optimizer, *given: Any, **named: Any) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return bare_step(self, *given, **named)

    def reduce(self: torch.optim.Optimizer) -> Any:  # by the name of the class a pickle would find torch's
        return _empty, (optimizer_class,), self.__getstate__()

    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    bare = {name: inspect.unwrap(getattr(optimizer_class, name)) for name in names}
    named = {"__module__": optimizer_class.__module__, "__doc__": optimizer_class.__doc__}
    more = {"step": step, "__reduce__": reduce}
    return type(optimizer_class.__name__, (optimizer_class,), bare | more | named)


def _empty(optimizer_class: Any) -> Any:
    return object.__new__(_eager(optimizer_class))


def _wrong_options(section: OptimizerSection, accepted: Mapping[str, inspect.Parameter]) -> list[str]:
    """A line for each of ``optimizer.options`` that the optimizer does not take, or that has a key of its own."""
    ours = ("lr", "weight_decay", "betas", "eps", "momentum")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    known = [key for key in list(accepted)[1:] if key not in ours]
    found = []
    for key, value in section.options.items():
        if key in ours:
            found.append(f"optimizer.options.{key}: write optimizer.{key}")
        elif key not in known and not takes_any:
            near = did_you_mean(key, known) or (f"; it takes {', '.join(known)}" if known else "; it takes none")
            found.append(f"optimizer.options.{key}: {section.name} has no such argument{near}")
        elif key in known and _is_switch(accepted[key]) and not isinstance(value, bool | None):
            found.append(f"optimizer.options.{key}: expected true or false, got {shown(value)}")
    return found


def _is_switch(parameter: inspect.Parameter) -> bool:
    """Whether an argument is true or false; any other value would count as true."""
    kinds = (bool, "bool", "bool | None", "Optional[bool]", bool | None)
    return isinstance(parameter.default, bool) or parameter.annotation in kinds


def set_learning_rate(optimizer: AnyOptimizer, value: float) -> None:
    """Give every group the learning rate ``value``, times the group's ``lr_scale`` where it has one (LoRA+)."""
    for group in optimizer.param_groups:
        rate = value * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # torchao's, which are compiled with it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
