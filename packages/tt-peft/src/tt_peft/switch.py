"""Find, switch and remove the adapters of a model, and the parameters to train.

LoRA+: https://arxiv.org/abs/2402.12354.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tt_peft.config import LoRAConfig
from tt_peft.lora import LoRAEmbedding, LoRALinear
from tt_peft.lowrank import AdapterModule, low_ranks
from tt_peft.nf4_linear import NF4Base, NF4Linear

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP and ``torch.compile``, from which names start."""
    while isinstance(model, DataParallel | DistributedDataParallel) or "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod" if "_orig_mod" in model._modules else "module")
    return model


def clean_name(name: str) -> str:
    """A name without the parts that wrappers (compile, checkpointing) add."""
    return _WRAPPERS.sub("", name + ".").removesuffix(".")


def adapted_modules(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterModule]:
    """Every module that owns adapters (or this one), by its clean name."""
    return {
        clean_name(name): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, AdapterModule) and (adapter is None or adapter in module.adapters)
    }


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters that the model has."""
    return list(dict.fromkeys(key for m in adapted_modules(model).values() for key in m.adapters))


def modules_of(model: nn.Module, adapter: str) -> dict[str, AdapterModule]:
    """The modules that own ``adapter``; ValueError if there are none."""
    modules = adapted_modules(model, adapter)
    if not modules:
        known = ", ".join(adapter_names(model)) or "none"
        raise ValueError(f"the model has no adapter {adapter!r}; it has: {known}")
    return modules


def adapter_config(model: nn.Module, adapter: str = "default") -> LoRAConfig:
    """The config with which an adapter was applied."""
    for module in modules_of(model, adapter).values():
        for low_rank in low_ranks(module, adapter).values():
            return low_rank.spec.config
    raise ValueError(f"adapter {adapter!r} has no low-rank part")


def set_adapter_(model: nn.Module, adapter: str | Sequence[str]) -> None:
    """Make one adapter active, or several, whose changes add up. Only the parameters of active adapters train."""
    chosen = (adapter,) if isinstance(adapter, str) else tuple(dict.fromkeys(adapter))
    for name in chosen:
        modules_of(model, name)
    for module in adapted_modules(model).values():
        module.active = tuple(name for name in chosen if name in module.adapters)
        for name, part in module.adapters.items():
            for local, parameter in part.named_parameters():
                parameter.requires_grad_(name in chosen and not local.startswith("start_"))


def remove_adapter_(model: nn.Module, adapter: str) -> None:
    """Remove an adapter, in place. A module without adapters gets its plain class back (NF4 weights stay NF4)."""
    for module in modules_of(model, adapter).values():
        del module.adapters[adapter]
        module.active = tuple(name for name in module.active if name != adapter)
        if not module.adapters:
            plain: nn.Module = module
            plain.__class__ = NF4Linear if isinstance(module, NF4Base) else plain_class(module)
            for name in ("adapters", "active", "disabled"):
                delattr(plain, name)


def plain_class(module: AdapterModule) -> type[nn.Module]:
    """The class of a dense module before it was adapted."""
    if isinstance(module, LoRALinear | LoRAEmbedding):
        return module.base_class
    cls: type[nn.Module] = type(module).__bases__[1]  # class LoRAExperts(StackedLoRA, Experts)
    return cls


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are active."""
    return tuple(dict.fromkeys(name for module in adapted_modules(model).values() for name in module.active))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to train, by their full names: those of the active adapters."""
    return {
        f"{prefix}.{local}" if prefix else local: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, AdapterModule)
        for local in module.adapter_params()
        if (parameter := module.get_parameter(local)).requires_grad
    }


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes: a reference model that needs no memory."""
    modules = list(adapted_modules(model).values())
    if not modules:
        raise ValueError("the model has no adapter to disable (after merge_lora_, unmerge_lora_ brings it back)")
    before = [module.disabled for module in modules]
    try:
        for module in modules:
            module.disabled = True
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module.disabled = disabled


@contextmanager
def use_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Inside, the model computes with this adapter and no other; which parameters train does not change."""
    modules_of(model, adapter)
    modules = list(adapted_modules(model).values())
    before = [(module.active, module.disabled) for module in modules]
    try:
        for module in modules:
            module.active, module.disabled = (adapter,) if adapter in module.adapters else (), False
        yield
    finally:
        for module, (active, disabled) in zip(modules, before, strict=True):
            module.active, module.disabled = active, disabled


def copy_adapter_(model: nn.Module, new: str, adapter: str = "default") -> None:
    """A frozen copy of an adapter under another name, not active: where training started, or a snapshot.

    If the model has ``new`` already, as a model must that is sharded, it gets the values that ``adapter`` has now.
    Raises ValueError if there is no ``adapter``.
    """
    for module in modules_of(model, adapter).values():
        source = module.adapters[adapter]
        if new not in module.adapters:
            module.adapters[new] = copy.deepcopy(source).requires_grad_(False)
            continue
        values = list(source.parameters())
        if values[0].device != next(module.adapters[new].parameters()).device:  # it was on meta
            module.adapters[new].to_empty(device=values[0].device)
        for own, value in zip(module.adapters[new].parameters(), values, strict=True):
            own.data.copy_(value.detach())


def lora_plus_groups(
    model: nn.Module, *, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, embedding_lr: float | None = None
) -> list[dict[str, Any]]:
    """LoRA+: parameter groups for a torch optimizer. B learns at ``ratio * lr``, everything else at ``lr``.

    ``embedding_lr`` (default: ``lr``) is for both factors of embeddings. DoRA's magnitudes and other vectors get no
    weight decay. Empty groups are left out.
    """
    if not lr > 0 or not ratio > 0 or (embedding_lr is not None and not embedding_lr > 0):
        raise ValueError(f"lr, ratio and embedding_lr must be positive, got {lr}, {ratio} and {embedding_lr}")
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "B": {"lr": lr * ratio, "weight_decay": weight_decay},
        "embedding": {"lr": lr if embedding_lr is None else embedding_lr, "weight_decay": weight_decay},
        "other": {"lr": lr, "weight_decay": weight_decay},
        "vector": {"lr": lr, "weight_decay": 0.0},
    }
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in adapter_parameters(model).items():
        parameters[_group(model, name, parameter)].append(parameter)
    if not any(parameters.values()):
        raise ValueError("the model has no adapter to train: call apply_lora_ first")
    return [{"name": name, "params": parameters[name], **groups[name]} for name in groups if parameters[name]]


def _group(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    owner = model.get_submodule(name.split(".adapters.")[0]) if ".adapters." in name else model
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("lora_A", "lora_B"):
        return "embedding" if isinstance(owner, nn.Embedding) else leaf.removeprefix("lora_")
    return "vector" if parameter.dim() == 1 else "other"
