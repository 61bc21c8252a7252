"""Adapters into the base weights: in fp32, and back to the base's dtype."""

import torch
from torch import nn

from tt_peft.apply import adapted_modules
from tt_peft.lora import AdapterModule, LoRAEmbedding, LowRank


@torch.no_grad()
def merge_lora_(model: nn.Module) -> None:
    """Add the active adapters to the base weights and take the adapters off, in place.

    Computed in fp32 and rounded once to the weight's dtype.
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapter to merge")
    for module in modules.values():
        weight = module.get_parameter("weight")
        merged = weight.float()
        for name in module.active:
            low_rank = module.adapters[name]
            assert isinstance(low_rank, LowRank)
            A, B = (factor.float() for factor in low_rank.factors())
            delta = low_rank.spec.scaling * (B @ A)
            merged = merged + (delta.T if isinstance(module, LoRAEmbedding) else delta)
        weight.copy_(merged)
        _take_off_(module)


def _take_off_(module: AdapterModule) -> None:
    for name in ("adapters", "active", "disabled"):
        delattr(module, name)
    module.__class__ = nn.Embedding if isinstance(module, LoRAEmbedding) else nn.Linear  # type: ignore[assignment]
