"""Modules that are trained in full beside the adapter: PEFT's ``modules_to_save``."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tt_peft.lowrank import MixedModule, mixed_class


class SavedModule(MixedModule):
    """A module of any class that an active copy of itself replaces; its own parameters do not change.

    The copy may have a wider dtype than the module (fp32 over bf16: small updates are not lost); it computes in the
    dtype of the module.
    """

    prefix = "Saved"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = self.active_adapters()
        if not active:
            return super().forward(*args, **kwargs)
        named, own = list(active[-1].named_parameters()), own_parameters(self)
        if all(part.dtype == base.dtype for (_, part), base in zip(named, own, strict=True)):
            return active[-1](*args, **kwargs)
        computing = {name: part.to(base.dtype) for (name, part), base in zip(named, own, strict=True)}
        return functional_call(active[-1], computing, args, kwargs)

    def effective_weight(self) -> Tensor:
        own, active = cast(Tensor, self.weight), self.active_adapters()
        return active[-1].weight.to(own.dtype) if active else own


def save_module_(module: nn.Module, adapter: str, *, dtype: torch.dtype | None = None) -> SavedModule:
    """Give a module a copy of itself, in ``dtype`` (default: the module's), that trains as a part of ``adapter``."""
    if isinstance(module, SavedModule):
        original = copy.deepcopy(next(iter(module.adapters.values())))
        for own, part in zip(own_parameters(module), original.parameters(), strict=True):
            part.data = own.detach().clone()
    else:
        original = copy.deepcopy(module)
        module.__class__ = mixed_class(SavedModule, type(module))
        assert isinstance(module, SavedModule)
        module.become_adapted_()
    for part in original.parameters():
        part.data = part.data.to(dtype or part.dtype)
    module.adapters[adapter] = original
    return module


def own_parameters(module: SavedModule) -> list[nn.Parameter]:
    """The base parameters, in the order in which a copy has them."""
    return [p for name, p in module.named_parameters() if "adapters" not in name.split(".")]


def copy_from_base_(module: SavedModule, adapter: str) -> None:
    """Set the copy to the values of the base, which was loaded after the adapter was applied."""
    part = module.adapters[adapter]
    for own, parameter in zip(own_parameters(module), part.parameters(), strict=True):
        parameter.data.copy_(own.detach())
