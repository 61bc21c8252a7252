"""Low-rank adaptation of linear layers and embeddings: https://arxiv.org/abs/2106.09685.

An adapted layer keeps its class's parameters under their names, so that base weights load before or after. Adapters
are children of the layer, by name: ``q_proj.adapters.default.lora_A``.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_peft.config import LoRAConfig


@dataclass(frozen=True)
class LowRankSpec:
    """The numbers of one adapter on one layer."""

    rank: int
    alpha: float
    scaling: float
    config: LoRAConfig


class LowRank(nn.Module):
    """The two factors of one adapter on one layer: the change of its weight is ``scaling * B @ A``.

    ``lora_A`` is [rank, in] and ``lora_B`` [out, rank] (an embedding: [rank, vocab] and [dim, rank]). DoRA adds
    ``lora_magnitude_vector``; PiSSA adds the factors it started from, which are subtracted.
    """

    def __init__(self, spec: LowRankSpec, shape_A: tuple[int, int], shape_B: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        dtype = spec.config.dtype or like.dtype
        self.lora_A = nn.Parameter(torch.empty(shape_A, device=like.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(shape_B, device=like.device, dtype=dtype))
        for name in ("lora_magnitude_vector", "lora_A_start", "lora_B_start"):
            self.register_parameter(name, None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(A, B)``; with a start point, ``([A; A0], [B, -B0])``."""
        if self.lora_A_start is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A_start]), torch.cat([self.lora_B, -self.lora_B_start], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """``scaling * B A dropout(x)`` for a linear layer."""
        A, B = (factor.to(x.dtype) for factor in self.factors())
        h = F.linear(F.dropout(x, self.spec.config.dropout, self.training), A)
        return F.linear(h * self.spec.scaling, B)

    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, alpha={self.spec.alpha}, dropout={self.spec.config.dropout}"


class AdapterModule(nn.Module):
    """A module that owns adapters, by name; some are active."""

    adapters: nn.ModuleDict
    active: tuple[str, ...]
    disabled: bool

    def become_adapted_(self) -> None:
        """Give a module whose class was just changed the fields of this one."""
        self.adapters = nn.ModuleDict()
        self.active = ()
        self.disabled = False

    def adapter_params(self) -> list[str]:
        """Local names of the parameters that are no base weights."""
        return [f"adapters.{name}" for name, _ in self.adapters.named_parameters()]

    def active_adapters(self) -> list[LowRank]:
        return [] if self.disabled else [cast(LowRank, self.adapters[name]) for name in self.active]


class LoRALinear(AdapterModule, nn.Linear):
    """``y = W x + b + scaling * B A dropout(x)`` with W and b frozen."""

    def add_adapter_(self, name: str, spec: LowRankSpec) -> LowRank:
        """A new adapter, its values not yet set."""
        shapes = (spec.rank, self.in_features), (self.out_features, spec.rank)
        adapter = LowRank(spec, *shapes, like=self.weight).train(self.training)
        self.adapters[name] = adapter
        return adapter

    def base_forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        for adapter in self.active_adapters():
            y = y + adapter(x)
        return y


class LoRAEmbedding(AdapterModule, nn.Embedding):
    """``y = W[x] + scaling * A[:, x]^T B^T`` with W frozen."""

    def add_adapter_(self, name: str, spec: LowRankSpec) -> LowRank:
        if spec.config.use_dora:
            raise ValueError("use_dora works on linear layers only: leave embeddings out of target_modules")
        shapes = (spec.rank, self.num_embeddings), (self.embedding_dim, spec.rank)
        adapter = LowRank(spec, *shapes, like=self.weight).train(self.training)
        self.adapters[name] = adapter
        return adapter

    def forward(self, input_ids: Tensor) -> Tensor:
        y = super().forward(input_ids)
        for adapter in self.active_adapters():
            A, B = (factor.to(y.dtype) for factor in adapter.factors())
            h = F.embedding(input_ids, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
            y = y + F.linear(h * adapter.spec.scaling, B)
        return y
