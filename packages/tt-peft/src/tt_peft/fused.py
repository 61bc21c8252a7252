"""The LoRA linear layer as one autograd function."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_peft.nf4 import dense


class _FusedLoRA(torch.autograd.Function):
    """``y = W x + b + s B A x``, added up in place.

    Nothing of the size of y is kept, W gets no gradient and, in NF4, is dequantized again in the backward; x gets one
    only where it needs one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, dense(weight, reuse=True).to(x.dtype), bias)
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
            grad_x = (grad_y @ dense(ctx.weight, reuse=True).to(grad_y.dtype)).addmm_(grad_h, A).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(0)
        return grad_x, None, grad_bias, grad_A, grad_B, None


def fused_lora(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *, scale: float) -> Tensor:
    """``x W^T + b + scale * (x A^T) B^T`` with W [out, in] frozen, dense or NF4, A [rank, in] and B [out, rank]."""
    return cast(Tensor, _FusedLoRA.apply(x, weight, bias, A, B, scale))  # type: ignore[no-untyped-call]
