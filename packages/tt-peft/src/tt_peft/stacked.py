"""LoRA on stacked weights such as those of experts: PEFT's ``target_parameters``."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tt_peft.lowrank import LowRank, LowRankSpec, MixedModule, mixed_class


class StackedLoRA(MixedModule):
    """A module of any class with 3-dimensional parameters ``W[e]``; it computes with ``W[e] + scaling * B[e] A[e]``.

    Parameters are [experts, out, in], or [experts, in, out] if the module has ``is_transposed = True``. The sum is
    formed in full at each forward, so that it does not matter how the module uses its weights.
    """

    prefix = "LoRA"
    is_transposed: bool

    def add_stacked_(self, name: str, specs: Mapping[str, LowRankSpec]) -> None:
        """An adapter for each of the parameters in ``specs``, its values not yet set."""
        parts = nn.ModuleDict()
        for local, spec in specs.items():
            weight = self.get_parameter(local)
            experts, first, second = weight.shape
            n_out, n_in = (second, first) if self.transposed() else (first, second)
            parts[local] = LowRank(spec, (experts, spec.rank, n_in), (experts, n_out, spec.rank), like=weight)
        self.adapters[name] = parts.train(self.training)

    def transposed(self) -> bool:
        return bool(getattr(self, "is_transposed", False))

    def effective(self) -> dict[str, Tensor]:
        """The parameters that active adapters change, with the changes added."""
        weights: dict[str, Tensor] = {}
        for parts in self.active_adapters():
            for local, low_rank in parts.items():
                weight = weights.get(local, self.get_parameter(local))
                A, B = low_rank.factors(weight.dtype)
                left, right = (A.transpose(1, 2), B.transpose(1, 2)) if self.transposed() else (B, A)
                weights[local] = torch.baddbmm(weight, left, right, alpha=low_rank.spec.scaling)
        return weights

    def delta(self, low_rank: LowRank) -> Tensor:
        """The change in fp32, in the layout of the parameter."""
        change = low_rank.delta()
        return change.transpose(1, 2) if self.transposed() else change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = self.effective()
        self.__dict__.update(changed)  # found before the parameters of the same names
        try:
            return super().forward(*args, **kwargs)
        finally:
            for local in changed:
                del self.__dict__[local]


def stack_lora_(module: nn.Module, adapter: str, specs: Mapping[str, LowRankSpec]) -> None:
    """Give the stacked parameters of a module adapters, in place."""
    if not isinstance(module, StackedLoRA):
        module.__class__ = mixed_class(StackedLoRA, type(module))
        cast(StackedLoRA, module).become_adapted_()
    cast(StackedLoRA, module).add_stacked_(adapter, specs)
