"""Low-rank adaptation of linear layers and embeddings: https://arxiv.org/abs/2106.09685.

An adapted layer keeps its parameters under their names, so that base weights load before or after. Adapters are
children of the layer, by name: ``q_proj.adapters.default.lora_A``.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_peft.config import LoRAConfig
from tt_peft.lowrank import AdapterModule, LowRank, LowRankSpec, row_norms, start_from_loss_
from tt_peft.nf4 import dense, frozen_linear
from tt_peft.nf4_linear import NF4Base
from tt_peft.product import product

FUSE_FROM_ROWS = 256  # measured: the suite layer of benchmarks/


class LoRALinear(AdapterModule, nn.Linear):
    """``y = W x + b + scaling * B A dropout(x)`` with W and b frozen."""

    fused = True  # use the fused function if it applies and is faster; False: never
    dora = False
    base_class: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A frozen linear layer with an adapter "default", for a model written by hand."""
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.become_adapted_()
        config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, use_dora=self.dora, target_modules="all-linear")
        self.add_adapter_("default", LowRankSpec(rank, alpha, config.scaling(rank, alpha), config))
        self.active = ("default",)
        if not self.weight.is_meta:
            adapter = self.active_adapters()[0]
            adapter.reset_parameters()
            if self.dora:
                adapter.lora_magnitude_vector.data.copy_(row_norms(self.weight, adapter))

    def add_adapter_(self, name: str, spec: LowRankSpec) -> None:
        """A new adapter, its values not yet set."""
        shapes = (spec.rank, self.in_features), (self.out_features, spec.rank)
        self.adapters[name] = LowRank(spec, *shapes, like=self.weight).train(self.training)

    def base_forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)

    def effective_weight(self) -> Tensor:
        """W with the active adapters added, differentiable: for a loss that multiplies by the weight itself."""
        weight = dense(self.weight)
        for adapter in self.active_adapters():
            A, B = adapter.factors(weight.dtype)
            weight = torch.addmm(weight, B, A, alpha=adapter.spec.scaling)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        active = self.active_adapters()
        if len(active) == 1 and self.fused and not self.weight.requires_grad and can_fuse(x, active[0]):
            A, B = active[0].factors(x.dtype)
            return fused_lora(x, self.weight, self.bias, A, B, scale=active[0].spec.scaling)
        y = self.base_forward(x)
        for adapter in active:
            y = y + adapter(x)
        return y


def can_fuse(x: Tensor, adapter: LowRank) -> bool:
    """Whether the fused function applies and pays: with few rows its overhead is larger than what it saves."""
    if adapter.drops or x.numel() < FUSE_FROM_ROWS * x.shape[-1]:
        return False
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type))


class _FusedLoRA(torch.autograd.Function):
    """``y = W x + b + s B A x``, added up in place.

    Nothing of the size of y is kept. W gets no gradient and, in NF4, is dequantized again in the backward. x gets a
    gradient only if it needs one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = product(flat, dense(weight, reuse=True).to(x.dtype), bias)
        h = flat @ A.T
        y.addmm_(h, B.T, alpha=scale)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        ctx.save_for_backward(flat, h, A, B)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor, Tensor, None]:
        x, h, A, B = ctx.saved_tensors
        grad_y = grads[0].reshape(-1, B.shape[0])
        grad_h = (grad_y @ B).mul_(ctx.scale)
        grad_A = grad_h.T @ x
        grad_B = (h.T @ grad_y).mul_(ctx.scale).T  # this order is the faster one on CPU
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = dense(ctx.weight, reuse=True).to(grad_y.dtype)
            grad_x = product(grad_y, weight.t()).addmm_(grad_h, A).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(0)
        return grad_x, None, grad_bias, grad_A, grad_B, None


def fused_lora(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *, scale: float) -> Tensor:
    """``x W^T + b + scale * (x A^T) B^T`` with W [out, in] frozen, dense or NF4, A [rank, in] and B [out, rank]."""
    return cast(Tensor, _FusedLoRA.apply(x, weight, bias, A, B, scale))  # type: ignore[no-untyped-call]


class LoRAEmbedding(AdapterModule, nn.Embedding):
    """``y = W[x] + scaling * A[:, x]^T B^T`` with W frozen."""

    base_class: type[nn.Module] = nn.Embedding

    def add_adapter_(self, name: str, spec: LowRankSpec) -> None:
        shapes = (spec.rank, self.num_embeddings), (self.embedding_dim, spec.rank)
        self.adapters[name] = LowRank(spec, *shapes, like=self.weight).train(self.training)

    def effective_weight(self) -> Tensor:
        """W with the active adapters added, differentiable."""
        weight: Tensor = self.weight
        for adapter in self.active_adapters():
            A, B = adapter.factors(weight.dtype)
            weight = torch.addmm(weight, A.T, B.T, alpha=adapter.spec.scaling)
        return weight

    def forward(self, input_ids: Tensor) -> Tensor:
        y = super().forward(input_ids)
        for adapter in self.active_adapters():
            A, B = adapter.factors(y.dtype)
            h = F.embedding(input_ids, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
            y = y + F.linear(h * adapter.spec.scaling, B)
        return y


class QLoRALinear(NF4Base, LoRALinear):
    """LoRA on an NF4 weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.weight.is_meta:
            self.load_base_("weight", self.weight.detach())

    def needs_dense(self) -> bool:
        return bool(self._from_loss())

    def base_loaded_(self, tensor: Tensor) -> None:
        """Adapters that start from what quantization loses (LoftQ) see the dense weight now or never."""
        for adapter in self._from_loss():
            start_from_loss_(adapter, tensor, self.weight)

    def _from_loss(self) -> list[LowRank]:
        low_ranks = [adapter for adapter in self.adapters.values() if isinstance(adapter, LowRank)]
        return [each for each in low_ranks if each.spec.config.init == "loftq" and not each.started]
