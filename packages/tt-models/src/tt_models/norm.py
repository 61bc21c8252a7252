"""Root mean square normalization, computed in fp32: https://arxiv.org/abs/1910.07467.

Three roundings exist among the families; in fp32 the first two are the same.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.rows import by_rows, gradients_with_graph, in_blocks, is_eager, row_blocks


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
        return by_rows(self.formula, x)

    def formula(self, x: Tensor) -> Tensor:
        """``forward`` in plain terms."""
        if x.numel() == x.shape[-1] and not torch.is_grad_enabled() and x.device.type == "cpu" and is_eager(x):
            return self.weight * normalized_row(x, self.eps)
        if torch.is_grad_enabled() and x.dtype == self.weight.dtype and in_blocks(x, self.weight):
            y: Tensor = NormAndWeight.apply(x, self.weight, self.eps)[0]  # type: ignore[no-untyped-call]
            return y
        return norm_and_weight(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.numel()}, eps={self.eps}"


class LateRoundingRMSNorm(RMSNorm):
    """The same, rounded after the weight (OLMo 2, gpt-oss)."""

    def formula(self, x: Tensor) -> Tensor:
        """``forward`` in plain terms."""
        return (self.weight * normalized(x, self.eps)).to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """``y = (1 + w) * x / sqrt(mean(x^2) + eps)``, rounded at the end; ``w`` begins at zero (Gemma)."""

    def reset_parameters(self) -> None:
        """Weight zero."""
        nn.init.zeros_(self.weight)

    def formula(self, x: Tensor) -> Tensor:
        """``forward`` in plain terms."""
        return (normalized(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


def norm_and_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * normalized(x)``, rounded to the dtype of ``x`` between."""
    return weight * F.rms_norm(x, x.shape[-1:], None, eps)


def normalized(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, in fp32."""
    x_32 = x.float()
    return x_32 * torch.rsqrt(x_32.pow(2).mean(-1, keepdim=True) + eps)


def normalized_row(x: Tensor, eps: float) -> Tensor:
    """``normalized`` of one row, rounded to its dtype, in few calls: while decoding, calls are what a norm costs."""
    row = x.float().view(-1)
    mean: float = row.dot(row).item() / row.numel() + eps
    scale = mean**-0.5 if mean else torch.inf  # as tensors have it
    return (row * scale).to(x.dtype).view(x.shape)


class NormAndWeight(torch.autograd.Function):
    """``w * normalized(x)``, both ways in blocks of rows; it keeps ``x`` and a number per row.

    It rounds where automatic differentiation of the formula rounds; only the weight's gradient is summed more exactly.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``y``, and ``1 / sqrt(mean(x^2) + eps)`` of each row."""
        y, scale = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        for x_block, y_block, scale_block in row_blocks(x, y, scale):
            x_32 = x_block.float()
            torch.rsqrt(x_32.square().mean(-1, keepdim=True).add_(eps), out=scale_block)
            torch.mul((x_32 * scale_block).to(x.dtype), weight, out=y_block)
        return y, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what backward needs."""
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.eps = inputs[2]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """With ``g = grad_y w`` and ``s`` the scale: ``grad_x = s g - x s^3 mean(g x)``."""
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_with_graph(partial(norm_and_weight, eps=ctx.eps), (x, weight), grad_y), None
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for x_block, s, gy, gx in row_blocks(x, scale, grad_y.contiguous(), grad_x):
            x_32 = x_block.float()
            if needs_weight:
                grad_weight += (x_32 * s).to(x.dtype).mul_(gy).sum(0, dtype=torch.float32)
            if needs_x:
                g = (gy * weight).float()
                shrink = (g * x_32).sum(-1, keepdim=True).mul_(s.pow(3)).div_(x.shape[-1])
                gx.copy_(g.mul_(s).sub_(x_32 * shrink))
        return grad_x if needs_x else None, grad_weight.to(weight.dtype) if needs_weight else None, None
