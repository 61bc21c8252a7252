"""Give a model adapters, in place, and the adapters their starting values.

PiSSA: https://arxiv.org/abs/2404.02948.
"""

import re
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tt_peft.config import LoRAConfig
from tt_peft.dora import DoRALinear, QDoRALinear
from tt_peft.full_modules import SavedModule, copy_from_base_, save_module_
from tt_peft.lora import LoRAEmbedding, LoRALinear, QLoRALinear
from tt_peft.lowrank import (
    AdapterModule,
    LowRank,
    LowRankSpec,
    assign_,
    is_sharded,
    low_ranks,
    normal,
    principal_factors,
    row_norms,
    spec_of,
    whole,
)
from tt_peft.merge import keep_merged_
from tt_peft.modules import (
    all_modules,
    check_plain_weight,
    is_embedding,
    is_linear,
    nearest,
    output_projection_names,
    own_modules,
    select,
    select_modules,
    tied_embedding,
)
from tt_peft.names import layers_of, owner_of
from tt_peft.nf4 import dense, is_nf4
from tt_peft.nf4_linear import NF4Base
from tt_peft.quantize import quantizable_names, quantize_linear_
from tt_peft.shown import shown
from tt_peft.stacked import stack_lora_
from tt_peft.switch import adapter_names, modules_of, set_adapter_


def apply_lora_(model: nn.Module, config: LoRAConfig, *, adapter: str = "default") -> list[str]:
    """Freeze ``model`` and give every target an adapter, in place. Returns the names of what was adapted.

    The starting values are drawn from torch's global generator, and the model computes the same as before. With
    ``quantize_base`` every linear layer becomes NF4, adapted or not, except ``quantize_skip`` and modules trained in
    full. A second call with a different ``adapter`` name adds a second adapter and makes it the active one. An adapter
    that was merged before stays merged: ``unmerge_lora_`` cannot undo a merge below a new adapter.

    On a model on the meta device nothing is drawn: load the base weights, then call ``init_adapter_`` or
    ``load_adapter``.
    """
    if not isinstance(adapter, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", adapter):
        raise ValueError(f"adapter name {shown(adapter)} is not valid: use letters, digits, - and _")
    if adapter in adapter_names(model):
        raise ValueError(f"the model already has an adapter {adapter!r}: give the new one another name")
    names, stacked = target_names(model, config), stacked_names(model, config)
    saved = select_modules(model, config.modules_to_save, what="modules_to_save")
    _check(model, config, names, saved)
    to_quantize = quantizable_names(model, skip=config.quantize_skip, saved=saved) if config.quantize_base else []
    modules = all_modules(model)
    model.requires_grad_(False)
    keep_merged_(model)
    for name in saved:
        save_module_(modules[name], adapter, dtype=config.dtype)
    for name in names:
        _adapt_(modules[name], config).add_adapter_(adapter, spec_of(name, config))
    by_owner: dict[str, dict[str, LowRankSpec]] = {}
    for name in stacked:
        owner, _, local = name.rpartition(".")
        by_owner.setdefault(owner, {})[local] = spec_of(name, config)
    for owner, specs in by_owner.items():
        stack_lora_(modules[owner], adapter, specs)
    for name in to_quantize:
        quantize_linear_(modules[name], name=f"{name}.weight")
    set_adapter_(model, adapter)
    if not any(p.is_meta for p in model.parameters()):
        init_adapter_(model, adapter)
    return names + stacked + saved


def target_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the linear layers and embeddings that ``config`` targets, in the model's order."""
    chosen = select_modules(model, config.target_modules, what="target_modules")
    if config.exclude_modules:
        excluded = set(select_modules(model, config.exclude_modules, what="exclude_modules"))
        chosen = [n for n in chosen if n not in excluded]
    if config.layers_to_transform:
        by_name = frozenset(() if isinstance(config.target_modules, str) else config.target_modules)
        wanted, layers = set(config.layers_to_transform), layers_of(chosen, config.layers_pattern)
        chosen = [n for n, layer in zip(chosen, layers, strict=True) if n in by_name or layer in wanted]
    if config.target_modules and not chosen:
        raise ValueError("target_modules: nothing is left after exclude_modules and layers_to_transform")
    adapted = chosen + stacked_names(model, config)
    for what, patterns in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        meaning = patterns.meaning(adapted)
        unknown = next((pattern for pattern in getattr(config, what) if pattern not in meaning), None)
        if unknown is not None:
            raise ValueError(f"{what}: {shown(unknown)} matches no adapted module{nearest(unknown, adapted)}")
    return chosen


def stacked_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the stacked parameters that ``config`` targets."""
    named = ((owner, *each) for owner, m in all_modules(model).items() for each in m.named_parameters(recurse=False))
    names = [f"{owner}.{local}" if owner else local for owner, local, p in named if p.dim() == 3]
    return select(config.target_parameters, names, what="target_parameters")


def _check(model: nn.Module, config: LoRAConfig, names: Sequence[str], saved: Sequence[str]) -> None:
    modules, owners = own_modules(model), frozenset(saved)
    _warn_of_tie(model, [*names, *saved])
    for name in names:
        module = modules[name]
        if owner_of(name, owners) or isinstance(module, SavedModule):
            raise ValueError(f"{name} is in target_modules and trained in full by modules_to_save: choose one")
        if not is_linear(module) and not is_embedding(module):
            raise ValueError(f"{name} is a {type(module).__name__}: LoRA needs nn.Linear or nn.Embedding")
        check_plain_weight(name, module)
        if isinstance(module, nn.Embedding) and (config.use_dora or config.init != "kaiming"):
            raise ValueError(f"{name} is an embedding: use_dora=False and init='kaiming' only")
        rank, limit = config.ranks.get(name, config.rank), min(module.get_parameter("weight").shape)
        if rank > limit:
            text = f"{name}: rank {rank} is above min(in, out) = {limit}; rank {limit} can express just as much"
            warnings.warn(text, stacklevel=3)
    for part, module in modules.items() if saved else ():
        owner = owner_of(part, owners)
        if owner is not None and isinstance(module, NF4Base):
            raise ValueError(f"modules_to_save: {part} is NF4, which cannot be trained: put {owner} in quantize_skip")
        is_saved = part == owner and isinstance(module, SavedModule)
        if owner is not None and isinstance(module, AdapterModule) and not is_saved:
            raise ValueError(f"modules_to_save: {part} has an adapter already: {owner} cannot be trained in full")


def _warn_of_tie(model: nn.Module, names: Sequence[str]) -> None:
    """Warn if an embedding or an output projection is adapted that shares its weight with the other."""
    tied, heads = tied_embedding(model), output_projection_names(model)
    changed = [name for name in names if name == tied or name in heads]
    if tied is not None and changed:
        other = "the output projection" if changed[0] == tied else tied
        warnings.warn(
            f"{changed[0]} shares its weight with {other}, which keeps the base's: this adapter cannot be merged; for "
            "both, give the base a separate output projection (tie_word_embeddings=false)",
            stacklevel=4,
        )


def _adapt_(module: nn.Module, config: LoRAConfig) -> LoRALinear | LoRAEmbedding:
    """Change the class of a layer; the object, its parameters and its hooks stay the same."""
    before = type(module)
    if isinstance(module, nn.Embedding):
        module.__class__ = LoRAEmbedding
    elif config.use_dora or isinstance(module, DoRALinear):
        module.__class__ = QDoRALinear if isinstance(module, NF4Base) else DoRALinear
    else:
        module.__class__ = QLoRALinear if isinstance(module, NF4Base) else LoRALinear
    assert isinstance(module, LoRALinear | LoRAEmbedding)
    if not issubclass(before, AdapterModule):
        module.become_adapted_()
        module.base_class = nn.Linear if issubclass(before, NF4Base) else before
    return module


def init_adapter_(model: nn.Module, adapter: str = "default") -> None:
    """Set the starting values of an adapter; parameters on the meta device move to the device of their base weight.

    ``apply_lora_`` does this, except for a model on the meta device: load its base weights, then call this. The values
    depend on torch's global generator alone (``torch.manual_seed``): not on device, dtype or sharding.
    """
    for name, module in modules_of(model, adapter).items():
        materialise_(name, module, adapter)
        if isinstance(module, SavedModule):
            copy_from_base_(module, adapter)
        for low_rank in low_ranks(module, adapter).values():
            start_(name, module, low_rank)


def materialise_(name: str, module: AdapterModule, adapter: str) -> None:
    """Give an adapter on the meta device memory on its base's device."""
    part = module.adapters[adapter]
    if any(p.is_meta for p in part.parameters()):
        base = next(iter(module.parameters(recurse=isinstance(module, SavedModule))))
        if base.is_meta:
            raise ValueError(f"{name} is on the meta device: load the base weights before the adapter's values")
        if any(map(is_sharded, part.parameters())):
            part.to_empty(device=base.device)
            return
        for owner in part.modules():  # to_empty imports sympy for a tensor on the meta device
            for local, old in list(owner.named_parameters(recurse=False)):
                fresh = torch.empty(old.shape, dtype=old.dtype, device=base.device)
                setattr(owner, local, nn.Parameter(fresh, requires_grad=old.requires_grad))


@torch.no_grad()
def start_(name: str, module: AdapterModule, low_rank: LowRank) -> None:
    """Set the values of one pair of factors (and DoRA's magnitude: the norms of the base's rows)."""
    init = low_rank.spec.config.init
    if init == "loftq" and is_nf4(cast(Tensor, module.weight)):
        if not low_rank.started:
            raise ValueError(f"{name} was NF4 before: init='loftq' needs the dense weight, so quantize both at once")
        return
    values = _special_start(module, low_rank)
    if values is None:
        low_rank.reset_parameters()
    else:
        assign_(low_rank.lora_A, values[0])
        assign_(low_rank.lora_B, values[1])
        if low_rank.start_A is not None and low_rank.start_B is not None:
            assign_(low_rank.start_A, values[0])
            assign_(low_rank.start_B, values[1])
    if low_rank.lora_magnitude_vector is not None:
        weight = whole(dense(cast(Tensor, module.weight)))
        assign_(low_rank.lora_magnitude_vector, row_norms(weight, low_rank))
    low_rank.started = True


def _special_start(module: AdapterModule, low_rank: LowRank) -> tuple[Tensor, Tensor] | None:
    """The starting values of A and B that are not the usual ones; None for the usual ones."""
    shape_A, shape_B = low_rank.lora_A.shape, low_rank.lora_B.shape
    config, rank = low_rank.spec.config, low_rank.spec.rank
    if isinstance(module, LoRAEmbedding):
        return torch.zeros(shape_A), normal(shape_B, 1.0)
    if config.init == "gaussian":
        return normal(shape_A, 1.0 / rank), torch.zeros(shape_B)
    if config.init in ("pissa", "loftq") and isinstance(module, LoRALinear):
        return principal_factors(whole(dense(module.weight)), rank, low_rank.spec.scaling)
    return None
