"""The verbs over a whole model: give it adapters, find them, switch them."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tt_peft.config import LoRAConfig
from tt_peft.initial import init_adapter_
from tt_peft.lora import AdapterModule, LoRAEmbedding, LoRALinear, LowRank, LowRankSpec
from tt_peft.targets import first_match, in_layers, matches, output_projection_names, plain_linear, select

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def apply_lora_(model: nn.Module, config: LoRAConfig, *, adapter: str = "default") -> list[str]:
    """Freeze ``model`` and give every target module an adapter, in place. Returns the names of the adapted modules.

    The starting values are drawn from torch's global generator; the model computes what it did before (B is zero).
    A second call with another ``adapter`` name adds a second adapter and makes it the active one. On a model on the
    meta device, load the base weights afterwards and then call ``init_adapter_`` or ``load_adapter``.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", adapter):
        raise ValueError(f"adapter name {adapter!r} is not valid: use letters, digits, - and _")
    if adapter in adapter_names(model):
        raise ValueError(f"the model already has an adapter {adapter!r}: give the new one another name")
    for name in ("use_dora", "quantize_base", "target_parameters", "modules_to_save"):
        if getattr(config, name):
            raise ValueError(f"{name} is not available yet")
    names = target_names(model, config)
    modules = {name: model.get_submodule(name) for name in names}
    _check_modules(modules, config)
    model.requires_grad_(False)
    for name, module in modules.items():
        _adapt_(module).add_adapter_(adapter, _spec(name, module, config))
    if not any(p.is_meta for p in model.parameters()):
        init_adapter_(model, adapter)
    set_adapter_(model, adapter)
    return names


def target_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the modules that ``config`` targets, in the model's order."""
    names = own_module_names(model)
    if config.target_modules == "all-linear":
        head = set(output_projection_names(model))
        chosen = [n for n in names if plain_linear(model.get_submodule(n)) and n not in head]
        if not chosen:
            raise ValueError("target_modules: the model has no linear layer for 'all-linear'")
    else:
        chosen = select(tuple(config.target_modules), names, what="target_modules")
    if config.exclude_modules:
        excluded = set(select(config.exclude_modules, names, what="exclude_modules"))
        chosen = [n for n in chosen if n not in excluded]
    chosen = [n for n in chosen if in_layers(n, config.layers_to_transform)]
    if not chosen:
        raise ValueError("target_modules: nothing is left after exclude_modules and layers_to_transform")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(matches(pattern, n) for n in chosen):
            raise ValueError(f"rank_pattern, alpha_pattern: {pattern!r} matches no adapted module")
    return chosen


def own_module_names(model: nn.Module) -> list[str]:
    """Names of all modules but the root and what adapters added."""
    added = [m.adapters for m in model.modules() if isinstance(m, AdapterModule)]
    skip = {id(part) for modules in added for part in modules.modules()}
    return [name for name, module in model.named_modules() if name and id(module) not in skip]


def _check_modules(modules: dict[str, nn.Module], config: LoRAConfig) -> None:
    for name, module in modules.items():
        if not isinstance(module, LoRALinear | LoRAEmbedding | nn.Embedding) and not plain_linear(module):
            raise ValueError(f"{name} is a {type(module).__name__}: LoRA goes on nn.Linear and nn.Embedding")
        rank = first_match(config.rank_pattern, name, config.rank)
        limit = min(module.get_parameter("weight").shape)
        if rank > limit:
            warnings.warn(f"{name}: rank {rank} is above min(in, out) = {limit} and adds nothing over it", stacklevel=3)


def _adapt_(module: nn.Module) -> LoRALinear | LoRAEmbedding:
    """Change the class of a plain layer; the object, its parameters and its hooks stay."""
    if not isinstance(module, AdapterModule):
        module.__class__ = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
        module.become_adapted_()  # type: ignore[operator]
    assert isinstance(module, LoRALinear | LoRAEmbedding)
    return module


def _spec(name: str, module: nn.Module, config: LoRAConfig) -> LowRankSpec:
    rank = first_match(config.rank_pattern, name, config.rank)
    alpha = first_match(config.alpha_pattern, name, config.alpha)
    return LowRankSpec(rank=rank, alpha=alpha, scaling=config.scaling(rank, alpha), config=config)


def adapted_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Every module that owns adapters, by the name it has without wrappers (DDP, compile, checkpointing)."""
    return {clean_name(n): m for n, m in model.named_modules() if isinstance(m, AdapterModule)}


def clean_name(name: str) -> str:
    return _WRAPPERS.sub("", name).removeprefix("module.")


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters that the model has."""
    return list(dict.fromkeys(key for m in adapted_modules(model).values() for key in m.adapters))


def set_adapter_(model: nn.Module, adapter: str | Sequence[str]) -> None:
    """Make one adapter (or several, whose changes add up) the active one; only its parameters train."""
    chosen = (adapter,) if isinstance(adapter, str) else tuple(adapter)
    known = adapter_names(model)
    for name in chosen:
        if name not in known:
            raise ValueError(f"the model has no adapter {name!r}; it has: {', '.join(known) or 'none'}")
    for module in adapted_modules(model).values():
        module.active = tuple(name for name in chosen if name in module.adapters)
        for name, part in module.adapters.items():
            for local, parameter in part.named_parameters():
                parameter.requires_grad_(name in chosen and not local.endswith("_start"))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to train, by their full names: those of the active adapter."""
    return {
        f"{prefix}.{local}" if prefix else local: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, AdapterModule)
        for local in module.adapter_params()
        if (parameter := module.get_parameter(local)).requires_grad
    }


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes: a free reference model."""
    modules = list(adapted_modules(model).values())
    if not modules:
        raise ValueError("the model has no adapter to disable (merge_lora_ removes adapters)")
    before = [module.disabled for module in modules]
    try:
        for module in modules:
            module.disabled = True
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module.disabled = disabled


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under the names of PEFT files without their ``base_model.model.`` prefix."""
    return {key: parameter.detach() for key, parameter in _parameters_by_key(model, adapter).items()}


@torch.no_grad()
def load_adapter_state_(model: nn.Module, state: dict[str, Tensor], *, adapter: str = "default") -> None:
    """The inverse of ``adapter_state_dict``: set every tensor of an adapter that the model has."""
    own = _parameters_by_key(model, adapter)
    problems = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} has shape {list(state[k].shape)}, expected {list(p.shape)}"
        for k, p in own.items()
        if k in state and state[k].shape != p.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the adapter does not fit this model: {'; '.join(problems[:3])}{more}")
    for module in adapted_modules(model).values():
        weight = module.get_parameter("weight")
        if adapter in module.adapters and not weight.is_meta:
            if any(p.is_meta for p in module.adapters[adapter].parameters()):
                module.adapters[adapter].to_empty(device=weight.device)
    for key, parameter in _parameters_by_key(model, adapter).items():
        if parameter.is_meta:
            raise ValueError(f"{key}: the base is on the meta device; load the base weights before the adapter")
        parameter.copy_(state[key])


def _parameters_by_key(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    keys: dict[str, nn.Parameter] = {}
    for name, module in adapted_modules(model).items():
        if adapter in module.adapters:
            low_rank = module.adapters[adapter]
            assert isinstance(low_rank, LowRank)
            for local, parameter in low_rank.named_parameters():
                keys[f"{name}.{_file_name(module, local)}"] = parameter
    if not keys:
        known = adapter_names(model)
        raise ValueError(f"the model has no adapter {adapter!r}; it has: {', '.join(known) or 'none'}")
    return keys


def _file_name(module: AdapterModule, local: str) -> str:
    if isinstance(module, LoRAEmbedding):
        return local.replace("lora_", "lora_embedding_")
    return local if local == "lora_magnitude_vector" else f"{local}.weight"
