"""Optimizers by name, and their state in a checkpoint."""

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt.ranks import is_dtensor
from tt_train.config import OptimizerSection
from tt_train.errors import ConfigError, TrainingError, did_you_mean
from tt_train.optim.master_weights import InBackward, MasterWeights, call
from tt_train.settings.registry import OPTIMIZERS, resolve

AnyOptimizer = torch.optim.Optimizer | MasterWeights
_NUMBER = "#"  # after the name of an entry that is a number and no tensor


def make_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection, *, narrow: bool = False, in_backward: bool = False
) -> MasterWeights:
    """The optimizer that ``section`` names, over ``groups`` of parameters; torch's fused kernels if it has them.

    What it updates is fp32, also behind bf16 parameters. ``narrow``: fp32 parameters become such bf16 ones.
    ``in_backward``: each parameter is updated while the backward pass runs.
    """
    if in_backward:
        each = [[{**group, "params": [parameter]}] for group in groups for parameter in group["params"]]
        return InBackward(*(_torch_optimizer(one, section) for one in each), narrow=narrow)
    return MasterWeights(_torch_optimizer(groups, section), narrow=narrow, together=section.name not in OPTIMIZERS)


def decayed(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay as the optimizer says; norms, biases and other vectors do not decay."""
    every = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in every if parameter.dim() > 1]},
        {"params": [parameter for parameter in every if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _torch_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    optimizer_class = _resolved(section.name)
    accepted = inspect.signature(optimizer_class).parameters
    chosen: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay, "betas": tuple(section.betas),
                              "eps": section.eps, "momentum": section.momentum, "fused": True}  # fmt: skip
    defaults = OptimizerSection()
    for key in ("betas", "eps", "momentum"):
        if key not in accepted and getattr(section, key) != getattr(defaults, key):
            raise ConfigError([f"optimizer.{key}: {section.name} has no {key}; leave it out"])
    chosen = {key: value for key, value in chosen.items() if key in accepted}
    if wrong := _wrong_options(section, accepted):
        raise ConfigError(wrong)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in section.options.items()}
    try:
        return optimizer_class(groups, **chosen | given)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, ValueError):  # a subclass tensor, a device or an option without a fused kernel
        if "fused" not in chosen or "fused" in given:
            raise
        del chosen["fused"]
        return optimizer_class(groups, **chosen | given)  # type: ignore[no-any-return]


def _resolved(name: str) -> Any:
    # torchao warns about each of its extensions that was built for a different Python, and torch about torchao
    levels = [(log, log.level) for log in map(logging.getLogger, ("torchao", "torch.utils._pytree"))]
    for log, _ in levels:
        log.setLevel(logging.ERROR)
    try:
        return resolve(name, OPTIMIZERS)
    finally:
        for log, level in levels:
            log.setLevel(level)


def _wrong_options(section: OptimizerSection, accepted: Mapping[str, inspect.Parameter]) -> list[str]:
    """A line for each of ``optimizer.options`` that the optimizer does not take, or that has a key of its own."""
    ours = ("lr", "weight_decay", "betas", "eps", "momentum")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    known = [key for key in list(accepted)[1:] if key not in ours]
    found = []
    for key in section.options:
        if key in ours:
            found.append(f"optimizer.options.{key}: write optimizer.{key}")
        elif key not in known and not takes_any:
            near = did_you_mean(key, known) or (f"; it takes {', '.join(known)}" if known else "; it takes none")
            found.append(f"optimizer.options.{key}: {section.name} has no such argument{near}")
    return found


def set_learning_rate(optimizer: AnyOptimizer, value: float) -> None:
    """Give every group the learning rate ``value``, times the group's ``lr_scale`` where it has one (LoRA+)."""
    for group in optimizer.param_groups:
        rate = value * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # torchao's, which are compiled with it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# ---- the optimizer's state in a checkpoint ----


def state_bytes(optimizer: MasterWeights) -> int:
    """How much the optimizer will keep for its parameters; it is called once per shape to find out."""
    sizes: dict[torch.Size, int] = {}
    total = 0
    for one, group, parameter in _members(optimizer):
        if parameter.shape not in sizes:
            state = _first_state(one, group, parameter)
            sizes[parameter.shape] = sum(tensor.nbytes for tensor in _flat(state).values())
        total += sizes[parameter.shape]
    return total


def optimizer_tensors(optimizer: AnyOptimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat, plain tensors: ``<parameter name>/<entry>``.

    The parts of a tensor of 8 or 4 bits are ``<entry>.codes``, ``<entry>.scale`` and so on; a number is a tensor named
    ``<entry>#``. What an optimizer counts per group of parameters is saved with the first of them, as ``group:<key>#``.
    TrainingError if it keeps something else, which could not be restored.
    """
    state = optimizer.state
    found: dict[str, Tensor] = {}
    for parameter, name in names.items():
        found |= {f"{name}/{entry}": tensor for entry, tensor in _flat(state.get(parameter, {})).items()}
    for group, counts in optimizer.counted() if isinstance(optimizer, MasterWeights) else ():
        name = names[group["params"][0]]
        found |= {f"{name}/{entry}": tensor for entry, tensor in _flat(counts, "group:").items()}
    return found


def load_optimizer_tensors_(
    optimizer: AnyOptimizer, tensors: Mapping[str, Tensor], names: dict[nn.Parameter, str]
) -> None:
    """The inverse of ``optimizer_tensors``; ValueError if names, shapes or dtypes are not the saved ones."""
    known, saved = set(names.values()), defaultdict[str, dict[str, Tensor]](dict)
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in known:
            raise ValueError(f"the checkpoint has optimizer state for {name[:200]!r}, which this run does not train")
        saved[name][entry] = value
    for one, group, parameter in _members(optimizer):
        name = names[parameter]
        counts = {entry: saved[name].pop(entry) for entry in list(saved[name]) if entry.startswith("group:")}
        for entry, value in counts.items():
            group[entry.removeprefix("group:").removesuffix(_NUMBER)] = value.item()
        if saved[name]:
            state = _first_state(one, group, parameter)
            _fill_(state, saved[name], name)
            one.state[parameter] = state


def _fill_(state: dict[str, Any], saved: Mapping[str, Tensor], name: str) -> None:
    """Write saved values into the first state of the parameter ``name``, where the optimizer has put it."""
    expected = _flat(state)
    for entry in sorted(expected.keys() ^ saved.keys()):
        what = "is missing" if entry in expected else "is not one that this optimizer keeps"
        raise ValueError(f"optimizer state {entry[:200]!r} of {name} {what}")
    for entry, tensor in expected.items():
        found = saved[entry]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            has = f"{list(found.shape)} ({found.dtype}), not {list(tensor.shape)} ({tensor.dtype})"
            raise ValueError(f"optimizer state {entry[:200]!r} of {name} has shape {has}")
        if entry.endswith(_NUMBER):
            state[entry.removesuffix(_NUMBER)] = found.item()
        else:
            tensor.copy_(found)


def _members(optimizer: AnyOptimizer) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], nn.Parameter]]:
    """Every parameter, with the optimizer and the group that it is in."""
    for one in optimizer.optimizers if isinstance(optimizer, MasterWeights) else (optimizer,):
        for group in one.param_groups:
            yield from ((one, group, parameter) for parameter in group["params"])


@torch.no_grad()
def _first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer keeps for ``parameter`` after its first step: a copy of it makes one, on zeros.

    So nothing need be known of an optimizer to restore its state, and a saved tensor must fit what the optimizer made.
    """
    zeros = nn.Parameter(torch.zeros_like(parameter, dtype=torch.float32))
    zeros.grad = torch.zeros_like(zeros)
    double: torch.optim.Optimizer = object.__new__(type(optimizer))
    vars(double).update(vars(optimizer))
    double.state, double.param_groups = defaultdict(dict), [{**group, "params": [zeros]}]
    call(double)
    first: dict[str, Any] = double.state[zeros]
    return first


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The entries of a parameter as plain tensors; TrainingError for one that could not be restored."""
    flat: dict[str, Tensor] = {}
    for entry, value in entries.items():
        if isinstance(value, Tensor):
            flat |= {f"{prefix}{entry}{part}": tensor for part, tensor in _parts(value).items()}
        elif isinstance(value, int | float):
            flat[f"{prefix}{entry}{_NUMBER}"] = torch.tensor(value)
        elif value is not None:
            kind = type(value).__name__
            raise TrainingError(
                f"optimizer: it keeps {entry!r} as a {kind}, which no checkpoint holds; use another one"
            )
    return flat


def _parts(value: Tensor) -> dict[str, Tensor]:
    """A tensor, or the plain ones that a tensor of few bits is made of."""
    if type(value) in (Tensor, nn.Parameter) or is_dtensor(value):
        return {"": value}
    return {f".{name}": getattr(value, name) for name in value.__tensor_flatten__()[0]}  # type: ignore[attr-defined]
