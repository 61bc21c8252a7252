"""Adapters into the base weights and out again."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tt_peft.dora import DoRALinear
from tt_peft.full_modules import SavedModule, own_parameters
from tt_peft.lora import LoRAEmbedding
from tt_peft.lowrank import AdapterModule, LowRank, is_sharded, low_ranks, row_norms
from tt_peft.modules import own_modules
from tt_peft.nf4 import dense, is_nf4
from tt_peft.nf4_linear import NF4Linear
from tt_peft.stacked import StackedLoRA
from tt_peft.switch import adapted_modules, clean_name, plain_class, unwrapped


@dataclass(frozen=True)
class LayerLoss:
    """The loss of merging one weight. ``lost``: the share of the adapter's change lost in rounding (0.01 = 1 %)."""

    name: str
    dtype: torch.dtype
    lost: float
    from_nf4: bool


@dataclass(frozen=True)
class MergeReport:
    """The result of ``merge_lora_``; ``str(report)`` is one line for a log."""

    layers: tuple[LayerLoss, ...]
    dequantized: tuple[str, ...] = ()
    """NF4 layers that had no adapter."""

    @property
    def worst(self) -> LayerLoss | None:
        """The weight that lost most in rounding."""
        return max(self.layers, key=lambda layer: layer.lost, default=None)

    @property
    def median(self) -> float:
        """The median of ``lost`` over the weights; 0 without any."""
        return statistics.median([layer.lost for layer in self.layers] or [0.0])

    def __str__(self) -> str:
        text = f"merged {len(self.layers)} weight{'s' * (len(self.layers) != 1)}"
        if self.worst is not None and not self.worst.lost:
            text += f"; rounding to {str(self.worst.dtype).removeprefix('torch.')} takes nothing of an adapter's change"
        elif self.worst is not None:
            kind = str(self.worst.dtype).removeprefix("torch.")
            text += (
                f"; rounding to {kind} takes {self.median:.2%} of an adapter's change at the median and "
                f"{self.worst.lost:.2%} at most ({self.worst.name})"
            )
        quantized = sum(layer.from_nf4 for layer in self.layers) + len(self.dequantized)
        if quantized:
            were = "1 weight was NF4 and is" if quantized == 1 else f"{quantized} weights were NF4 and are"
            text += f"; {were} now the values that NF4 stores, not the original ones"
        return text


@dataclass
class _Before:
    """What ``unmerge_lora_`` needs; not among the parameters of the module."""

    cls: type[nn.Module]
    fields: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    values: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # of a module that was trained in full


@torch.no_grad()
def merge_lora_(model: nn.Module, *, dtype: torch.dtype | None = None, keep_base: bool = False) -> MergeReport:
    """Add the active adapters to the base weights and remove the adapters, in place.

    Computed in fp32 and rounded once, to the weight's dtype or to ``dtype``. NF4 weights become dense. The model's
    modules and parameters are then those that it had before ``apply_lora_``. ``unmerge_lora_`` undoes it, to the last
    bit for NF4 weights and with ``keep_base=True``, which keeps a copy of each merged weight.
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapter to merge")
    if any(module.disabled for module in modules.values()):
        raise ValueError("the adapters are disabled: merge outside disable_adapter")
    _check_untied(model, modules)
    layers: list[LayerLoss] = []
    try:
        for name, module in modules.items():
            layers += _merge(name, module, dtype=dtype, keep_base=keep_base)
    except BaseException:  # out of memory and Ctrl-C too: never half a merge
        _unmerge_all(model)
        raise
    rest = {name: module for name, module in own_modules(model).items() if type(module) is NF4Linear}
    for layer in rest.values():
        weight = layer.get_parameter("weight")
        before = _Before(NF4Linear, weights={"weight": weight})
        plain = nn.Parameter(dense(weight).to(dtype or weight.dtype), requires_grad=False)
        _become(layer, nn.Linear, before, {"weight": plain})
    return MergeReport(tuple(layers), tuple(rest))


@torch.no_grad()
def unmerge_lora_(model: nn.Module) -> list[str]:
    """Undo ``merge_lora_``, in place. Returns the names of the modules that have their adapters back."""
    names = _unmerge_all(model)
    if not names:
        raise ValueError("the model is not merged")
    return names


def keep_merged_(model: nn.Module) -> None:
    """Forget what the modules were before ``merge_lora_``."""
    for module in model.modules():
        module.__dict__.pop("_before_merge", None)


def _unmerge_all(model: nn.Module) -> list[str]:
    merged = {clean_name(name): m for name, m in unwrapped(model).named_modules() if "_before_merge" in m.__dict__}
    for module in merged.values():
        before: _Before = module.__dict__.pop("_before_merge")
        module.__class__ = before.cls
        for name, value in before.fields.items():
            setattr(module, name, value)
        if isinstance(module, AdapterModule) and not isinstance(module, SavedModule):
            for local in _merged_names(module):
                if local not in before.weights:
                    _set(module, local, _without_adapters(module, local))
        for local, weight in before.weights.items():
            _set(module, local, weight)
        for own, value in before.values:
            own.data = value
    return list(merged)


def _merge(name: str, module: AdapterModule, *, dtype: torch.dtype | None, keep_base: bool) -> list[LayerLoss]:
    """Merge one module; it stays as it is if the result is not finite."""
    before = _Before(type(module), {key: getattr(module, key) for key in ("adapters", "active", "disabled")})
    if isinstance(module, SavedModule):
        return _merge_saved(name, module, before, dtype)
    losses, weights = [], {}
    for local in _merged_names(module):
        old = module.get_parameter(local)
        changes = ((low_rank, _delta(module, low_rank)) for low_rank in _active(module, local))  # one at a time
        kind = dtype or old.dtype
        stored, loss = merged_weight(f"{name}.{local}", dense(old), changes, dtype=kind, from_nf4=is_nf4(old))
        losses.append(loss)
        if keep_base or is_nf4(old) or stored.dtype != old.dtype or isinstance(module, DoRALinear):
            before.weights[local] = old
            stored = nn.Parameter(stored, requires_grad=False)
        weights[local] = stored
    _become(module, plain_class(module), before, weights)
    return losses


def merged_weight(
    name: str, weight: Tensor, changes: Iterable[tuple[LowRank, Tensor]], *, dtype: torch.dtype, from_nf4: bool = False
) -> tuple[Tensor, LayerLoss]:
    """A base weight with low-rank changes added (each with its delta in the layout of the weight), in ``dtype``.

    Computed in fp32 and rounded once. ``from_nf4`` is for the report. ValueError if the result is not finite.
    """
    base = weight.float()
    exact = base.clone()
    for low_rank, delta in changes:
        if low_rank.lora_magnitude_vector is not None:
            if is_sharded(base):
                raise ValueError("DoRA of a sharded model cannot be merged: load the adapter into a whole one")
            ratio = (low_rank.lora_magnitude_vector.float() / row_norms(base, low_rank))[:, None]
            delta = (ratio - 1) * base + ratio * delta
        exact += delta
    stored = exact.to(dtype)
    return stored, _loss(name, base, exact, stored, from_nf4=from_nf4)


def _merge_saved(name: str, module: SavedModule, before: _Before, dtype: torch.dtype | None) -> list[LayerLoss]:
    """The active copy's values replace the module's own."""
    losses, values = [], []
    parts = list(module.adapters[module.active[-1]].named_parameters()) if module.active else []
    for (local, part), own in zip(parts, own_parameters(module), strict=bool(parts)):
        stored = part.detach().to(dtype or own.dtype)
        losses.append(_loss(f"{name}.{local}", own.float(), part.float(), stored, from_nf4=False))
        values.append((own, stored))
    _become(module, plain_class(module), before, {})
    for own, stored in values:
        before.values.append((own, own.data))
        own.data = stored
    return losses


def _loss(name: str, base: Tensor, exact: Tensor, stored: Tensor, *, from_nf4: bool) -> LayerLoss:
    """How much of the distance from ``base`` to ``exact`` rounding to ``stored`` loses; all but ``stored`` in fp32."""
    if not torch.isfinite(stored.sum(dtype=torch.float32)) and not torch.isfinite(stored).all():  # the sum is faster
        raise ValueError(f"{name}: {_not_finite(exact, stored)}")
    change = torch.linalg.vector_norm(exact - base)
    lost = float(torch.linalg.vector_norm(stored.float() - exact) / change) if change > 0 else 0.0
    return LayerLoss(name, stored.dtype, lost, from_nf4)


def _not_finite(exact: Tensor, stored: Tensor) -> str:
    """What is wrong with a merged weight, and the cure."""
    if not torch.isfinite(exact).all():
        return "the merged weight is not finite; the adapter or the base is broken"
    kind = str(stored.dtype).removeprefix("torch.")
    count, largest = int((~torch.isfinite(stored)).sum()), float(exact.abs().max())
    return (
        f"{count} merged values overflow {kind} (the largest is {largest:.4g}, {kind} ends at "
        f"{torch.finfo(stored.dtype).max:.4g}); merge with dtype bf16 or fp32"
    )


def _merged_names(module: AdapterModule) -> list[str]:
    if isinstance(module, StackedLoRA):
        return list(dict.fromkeys(local for name in module.active for local in low_ranks(module, name)))
    return ["weight"]


def _active(module: AdapterModule, local: str) -> list[LowRank]:
    parts = [low_ranks(module, name) for name in module.active]
    return [part[local if isinstance(module, StackedLoRA) else ""] for part in parts]


def _delta(module: AdapterModule, low_rank: LowRank) -> Tensor:
    if isinstance(module, StackedLoRA):
        return module.delta(low_rank)
    return low_rank.delta().T if isinstance(module, LoRAEmbedding) else low_rank.delta()


def _without_adapters(module: AdapterModule, local: str) -> Tensor:
    """The merged weight less all active adapters (none of them DoRA: those keep their base)."""
    merged = module.get_parameter(local)
    return (merged.float() - sum(_delta(module, low_rank) for low_rank in _active(module, local))).to(merged.dtype)


def _become(module: nn.Module, cls: type[nn.Module], before: _Before, weights: dict[str, Tensor]) -> None:
    """Turn a module into its plain class, with these weights."""
    for name in before.fields:
        delattr(module, name)
    module.__class__ = cls
    module.__dict__["_before_merge"] = before
    for local, weight in weights.items():
        _set(module, local, weight)


def _set(module: nn.Module, local: str, weight: Tensor) -> None:
    """A parameter replaces the old one; a tensor is copied into it, so that an optimizer sees the change."""
    if isinstance(weight, nn.Parameter):
        setattr(module, local, weight)
    else:
        module.get_parameter(local).copy_(weight)


def _check_untied(model: nn.Module, modules: dict[str, AdapterModule]) -> None:
    """ValueError if two modules share a weight: it cannot be changed for one of them."""
    owners: dict[int, list[str]] = {}
    for name, module in own_modules(model).items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for name, module in modules.items():
        shared = [n for p in module.parameters(recurse=False) for n in owners.get(id(p), []) if n != name]
        if shared or (tied and isinstance(module, nn.Embedding)):
            with_what = shared[0] if shared else "the output projection"
            raise ValueError(
                f"{name} shares its weight with {with_what}: merging would change both; keep the adapter unmerged, "
                "or untie the model (tie_word_embeddings=False) before training"
            )
