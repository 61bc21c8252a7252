"""Root mean square normalization, computed in fp32: https://arxiv.org/abs/1910.07467.

Three roundings exist among the families; in fp32 the first two are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """``y = w * x / sqrt(mean(x^2) + eps)``, rounded to the dtype of ``x`` before the weight (Llama and most)."""

    def __init__(self, size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        if torch.is_grad_enabled() and self.is_plain(x):
            y: Tensor = NormAndWeight.apply(x, self.weight, self.eps)[0]  # type: ignore[no-untyped-call]
            return y
        return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)

    def is_plain(self, x: Tensor) -> bool:
        """Whether ``NormAndWeight`` may take over: one dtype, on a CPU, neither compiled nor distributed tensors."""
        same = x.dtype == self.weight.dtype and x.device.type == "cpu" and not torch.compiler.is_compiling()
        return same and type(x) is Tensor and type(self.weight) is nn.Parameter

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.numel()}, eps={self.eps}"


class LateRoundingRMSNorm(RMSNorm):
    """The same, rounded after the weight (OLMo 2, gpt-oss)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        return (self.weight * normalized(x, self.eps)).to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """``y = (1 + w) * x / sqrt(mean(x^2) + eps)``, rounded at the end; ``w`` begins at zero (Gemma)."""

    def reset_parameters(self) -> None:
        """Weight zero."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        return (normalized(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


def normalized(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, in fp32."""
    x_32 = x.float()
    return x_32 * torch.rsqrt(x_32.pow(2).mean(-1, keepdim=True) + eps)


class NormAndWeight(torch.autograd.Function):
    """``w * normalized(x)`` with a backward of few passes over memory, which keeps ``x`` and a number per row.

    It rounds where automatic differentiation of the formula rounds, so the gradients are the same bits.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``y``, and ``1 / sqrt(mean(x^2) + eps)`` of each row."""
        x_32 = x.float()
        room = x_32.pow(2)
        scale = torch.rsqrt(room.mean(-1, keepdim=True) + eps)
        return torch.mul(x_32, scale, out=room).to(x.dtype).mul_(weight), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what backward needs."""
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With ``g = grad_y w`` and ``s`` the scale: ``grad_x = s g - x s^3 mean(g x)``."""
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        x_32, size = x.float(), x.shape[-1]
        room = torch.empty_like(x_32)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mul(x_32, scale, out=room).to(x.dtype).mul_(grad_y).reshape(-1, size).sum(0)
        if ctx.needs_input_grad[0]:
            g = (grad_y * weight).float()
            shrink = torch.mul(g, x_32, out=room).sum(-1, keepdim=True).mul_(-0.5).mul_(scale.pow(3)).div_(size).mul_(2)
            grad_x = g.mul_(scale).add_(torch.mul(x_32, shrink, out=room)).to(x.dtype)
        return grad_x, grad_weight, None
