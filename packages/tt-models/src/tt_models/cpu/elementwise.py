"""``rms_norm``, ``gated`` and ``rotate``.

Each computes its formula as written. On a CPU, if nobody watches (no compiler, torch.func or DTensor), it computes the
same bits with its own backward pass, and in blocks of rows if that is faster. Small tensors take the formula.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_models.cpu import blocks
from tt_models.cpu.blocks import by_rows, in_blocks, is_eager, row_blocks

_silu_backward = torch.ops.aten.silu_backward.grad_input
# elements from which the calls of a kernel are paid; compared last, since a compiled graph would compile again for it
NORMED, ROTATED = 3 * 2**16, 2**16
GATED_BLOCK = 2 * blocks.BLOCK  # elements of a block of gate and up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, rounded to the dtype of ``x`` before the weight."""
    if not torch.is_grad_enabled():
        return by_rows(lambda rows: _norm_rows(rows, weight, eps), x)
    if x.dtype == weight.dtype and in_blocks(x, weight) and x.numel() > NORMED:
        y: Tensor = NormAndWeight.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return y
    return _norm_and_weight(x, weight, eps)


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``."""
    if activation is not F.silu or not in_blocks(gate, up) or gate.nbytes <= blocks.KEPT:
        return activation(gate) * up
    y: Tensor = GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + D / 2])`` of the first D elements of each head by their angle.

    ``cos`` repeats itself in both halves; ``sin`` is negative in the first one (``Rope.tables``).
    """
    dim = cos.shape[-1]
    if dim != x_BHSD.shape[-1]:
        return torch.cat((rotate(x_BHSD[..., :dim], cos, sin), x_BHSD[..., dim:]), dim=-1)
    kernel = is_eager(x_BHSD) and x_BHSD.device.type == "cpu" and x_BHSD.dtype == cos.dtype
    if not kernel or x_BHSD.numel() <= ROTATED:
        return x_BHSD * cos + x_BHSD.roll(dim // 2, -1) * sin  # rolling by a half exchanges the pairs
    if not torch.is_grad_enabled():
        return _rotated(x_BHSD, cos, sin)
    y: Tensor = Rotate.apply(x_BHSD, cos, sin)  # type: ignore[no-untyped-call]
    return y


def _norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm without gradient. One row in few calls: in decoding, calls are what a norm costs."""
    if x.numel() != x.shape[-1] or x.device.type != "cpu" or not is_eager(x):
        return _norm_and_weight(x, weight, eps)
    row = x.float().view(-1)
    mean: float = row.dot(row).item() / row.numel() + eps
    scale = mean**-0.5 if mean else torch.inf  # as tensors have it
    return weight * (row * scale).to(x.dtype).view(x.shape)


def _norm_and_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * F.rms_norm(x, x.shape[-1:], None, eps)


class NormAndWeight(torch.autograd.Function):
    """``rms_norm``, both ways in blocks of rows; it keeps ``x`` and a number per row.

    It rounds as automatic differentiation of the formula does; only the weight's gradient is summed more exactly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``y``; it keeps ``1 / sqrt(mean(x^2) + eps)`` of each row."""
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        for x_block, y_block, scale_block in row_blocks(x, y, scale):
            x_32 = x_block.float()
            torch.rsqrt(x_32.square().mean(-1, keepdim=True).add_(eps), out=scale_block)
            torch.mul(_times(x_32, scale_block, of=x_block).to(x.dtype), weight, out=y_block)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """With ``g = grad_y w`` and ``s`` the scale: ``grad_x = s g - x s^3 mean(g x)``."""
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_with_graph(lambda x, w: _norm_and_weight(x, w, ctx.eps), (x, weight), grad_y), None
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
                gx.copy_(g.mul_(s).sub_(_times(x_32, shrink, of=x_block)))
        return grad_x if needs_x else None, grad_weight.to(weight.dtype) if needs_weight else None, None


def _times(x_32: Tensor, scale: Tensor, *, of: Tensor) -> Tensor:
    """``x_32 * scale``, in place unless ``x_32`` is ``of`` itself."""
    return x_32 * scale if x_32 is of else x_32.mul_(scale)


class GatedSilu(torch.autograd.Function):
    """``silu(gate) * up``, both ways in blocks of rows; backward computes ``silu(gate)`` again instead of keeping it.

    The same bits as automatic differentiation gives. Faster only if the formula's buffers are too large to be kept.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """The shape of both."""
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(up)
        for g, u, out in row_blocks(gate, up, y, size=GATED_BLOCK):
            torch.mul(F.silu(g), u, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of gate and up."""
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _with_graph(lambda gate, up: F.silu(gate) * up, (gate, up), grad)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, dy, dg, du in row_blocks(gate, up, grad.contiguous(), grad_gate, grad_up, size=GATED_BLOCK):
            active = F.silu(g)
            torch.mul(dy, active, out=du)
            _silu_backward(torch.mul(dy, u, out=active), g, grad_input=dg)
        return grad_gate, grad_up


class Rotate(torch.autograd.Function):
    """``rotate``; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The shape of ``x``."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BHSD, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of ``x``."""
        cos, sin = ctx.saved_tensors
        back = rotate(grad, cos, -sin) if torch.is_grad_enabled() else _rotated(grad, cos, sin, sign=-1)
        return back, None, None


def _rotated(x_BHSD: Tensor, cos: Tensor, sin: Tensor, *, sign: int = 1) -> Tensor:
    """The same bits as the formula of ``rotate``, in the layout that projections give and with one buffer besides."""
    x, half = x_BHSD.transpose(1, 2), x_BHSD.shape[-1] // 2
    y = x * cos.transpose(1, 2)
    return y.add_(x.roll(half, -1).mul_(sin.transpose(1, 2)), alpha=sign).transpose(1, 2)


def _with_graph(formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ``formula(*inputs)`` that can be differentiated again; None if no gradient is wanted.

    For the backward of a ``torch.autograd.Function`` under ``create_graph``: with ``once_differentiable`` instead,
    ``torch.autograd.grad`` would silently leave its part out of a second derivative.
    """
    inputs = tuple(x.view_as(x) for x in inputs)  # so that no path from one to another is counted
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
