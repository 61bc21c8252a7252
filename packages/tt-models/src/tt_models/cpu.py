"""The blocks' formulas made fast on a CPU: ``rms_norm``, ``gated``, ``rotate`` and ``linear``.

Each of the four computes its formula as written. On a CPU, if nobody watches (no compiler, torch.func or DTensor), it
computes the same bits in blocks of rows that fit in the cache of a core, with its own backward pass. In decoding,
a few rows in bf16 use the product that reads the weight fastest. Each kernel is here because a benchmark shows what
it saves (benchmarks/models_speed.py and models_decode.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2**16  # elements of a block
GATED_BLOCK = 2**17  # of gate and up
MOST_ROWS = 16  # of a product in decoding: from 32 rows on nothing is gained


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last dimension, rounded to the dtype of ``x`` before the weight."""
    if not torch.is_grad_enabled():
        return by_rows(lambda rows: _norm_rows(rows, weight, eps), x)
    if x.dtype == weight.dtype and in_blocks(x, weight):
        y: Tensor = NormAndWeight.apply(x, weight, eps)[0]  # type: ignore[no-untyped-call]
        return y
    return _norm_and_weight(x, weight, eps)


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``."""
    if gate.numel() <= GATED_BLOCK or not in_blocks(gate, up):
        return activation(gate) * up
    y: Tensor = GatedActivation.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y


def rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + D / 2])`` of the first D elements of each head by their angle.

    ``cos`` repeats itself in both halves; ``sin`` is negative in the first one (``Rope.tables``).
    """
    dim = cos.shape[-1]
    if dim != x_BHSD.shape[-1]:
        return torch.cat((rotate(x_BHSD[..., :dim], cos, sin), x_BHSD[..., dim:]), dim=-1)
    if x_BHSD.numel() <= BLOCK or x_BHSD.device.type != "cpu" or not is_eager(x_BHSD):
        return x_BHSD * cos + x_BHSD.roll(dim // 2, -1) * sin  # rolling by a half exchanges the pairs
    if not torch.is_grad_enabled():
        return _rotate_halves(x_BHSD, cos, sin)
    y: Tensor = Rotate.apply(x_BHSD, cos, sin)  # type: ignore[no-untyped-call]
    return y


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``.

    Layers of another class than ``nn.Linear`` (adapted, quantized), layers with hooks and layers with a ``forward`` of
    their own are called as they are.
    """
    if type(layer) is not nn.Linear or is_watched(layer):
        return layer(x)  # type: ignore[no-any-return]
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]  # not by attribute: this runs for each token
    assert weight is not None
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as ``linear`` computes it."""
    return few_rows(x, weight, bias) if is_decoding(x, weight) else F.linear(x, weight, bias)


def by_rows(formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``formula(x)``, which treats each row alone and keeps the shape; without gradient, block by block."""
    if torch.is_grad_enabled() or x.numel() <= BLOCK or not in_blocks(x):
        return formula(x)
    y = torch.empty_like(x, dtype=formula(x.view(-1, x.shape[-1])[:1]).dtype)
    for y_block, x_block in row_blocks(y, x):
        y_block.copy_(formula(x_block))
    return y


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers of up to 32 MB, as it does once one of that size was freed.

    Until then each activation of such a size is mapped, zeroed and unmapped again, layer by layer: a fifth of a forward
    pass of 134M in a fresh process (``man 3 mallopt``, M_MMAP_THRESHOLD).
    Nothing is written to the buffer, so this costs next to nothing; other allocators just free it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


# when a kernel may be used


def _has_numbers(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is nn.Parameter


_SHAPE: type[Tensor] | None = None


@contextmanager
def shapes_alone(kind: type[Tensor] | None) -> Iterator[None]:
    """Inside, tensors of this type, which have a shape and no numbers, go through the kernels in one block.

    A plan of memory sees what a kernel keeps. Without it such tensors take the formulas.
    """
    global _SHAPE
    _SHAPE, before = kind, _SHAPE
    try:
        yield
    finally:
        _SHAPE = before


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with memory of its own, neither compiled, distributed nor under torch.func."""
    plain = _has_numbers(x) or type(x) is _SHAPE
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def in_blocks(*tensors: Tensor) -> bool:
    """Whether ``row_blocks`` may be used: contiguous on a CPU."""
    return all(is_eager(x) and x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def row_blocks(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Two-dimensional views of the same rows of each, as many as have ``size`` elements in the first one."""
    size = (size or BLOCK) if _has_numbers(tensors[0]) else tensors[0].numel()
    rows = max(1, size // tensors[0].shape[-1])
    return zip(*(x.view(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)  # type: ignore[no-untyped-call]


def is_watched(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says, or its weight is not a parameter (FSDP 1)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__ or "weight" not in layer._parameters


def is_decoding(x: Tensor, weight: Tensor) -> bool:
    """Whether these are a few rows in bf16 on a CPU, and no gradient is wanted."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


# the kernels


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with the weight as the left factor, so that oneDNN need not reorder it."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == x.shape[-1]:
        out = torch.mv(weight, x.reshape(-1))
    else:
        out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out + bias).view(shape)


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
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``y``, and ``1 / sqrt(mean(x^2) + eps)`` of each row."""
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
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
                gx.copy_(g.mul_(s).sub_(x_32 * shrink))
        return grad_x if needs_x else None, grad_weight.to(weight.dtype) if needs_weight else None, None


class GatedActivation(torch.autograd.Function):
    """``gated``, both ways in blocks of rows; backward computes ``activation(gate)`` again instead of keeping it.

    The same bits as automatic differentiation gives.
    """

    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The shape of both."""
        y = torch.empty_like(up)
        for g, u, out in row_blocks(gate, up, y, size=GATED_BLOCK):
            torch.mul(activation(g), u, out=out)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what backward needs."""
        ctx.save_for_backward(*inputs[:2])
        ctx.activation = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of gate and up."""
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_with_graph(lambda gate, up: ctx.activation(gate) * up, (gate, up), grad), None
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, dy, dg, du in row_blocks(gate, up, grad.contiguous(), grad_gate, grad_up, size=GATED_BLOCK):
            with torch.enable_grad():
                leaf = g.detach().requires_grad_()
                active = ctx.activation(leaf)
            torch.mul(dy, active.detach(), out=du)
            dg.copy_(torch.autograd.grad(active, leaf, dy * u)[0])
        return grad_gate, grad_up, None


class Rotate(torch.autograd.Function):
    """``rotate``, block by block; its gradient is rotated back."""

    @staticmethod
    def forward(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The shape of ``x``."""
        return _rotate_halves(x_BHSD, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what backward needs."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of ``x``."""
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def _rotate_halves(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same bits as the formula of ``rotate``."""
    y_BHSD = torch.empty_like(x_BHSD)
    shape = x_BHSD.shape[:1] + cos.shape[1:]
    size = BLOCK if _has_numbers(x_BHSD) else x_BHSD.numel()
    columns = max(1, size // (x_BHSD.shape[1] * x_BHSD.shape[3]))
    for row in zip(x_BHSD, y_BHSD, cos.expand(shape), sin.expand(shape), strict=True):
        for x, y, c, s in zip(*(part.split(columns, dim=1) for part in row), strict=True):
            torch.mul(x, c, out=y)
            for half, other, sine in zip(y.chunk(2, -1), reversed(x.chunk(2, -1)), s.chunk(2, -1), strict=True):
                half.add_(other * sine)
    return y_BHSD


def _with_graph(formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ``formula(*inputs)`` that can be differentiated again; None if no gradient is wanted.

    For the backward of a ``torch.autograd.Function`` under ``create_graph``: with ``once_differentiable`` instead,
    ``torch.autograd.grad`` would silently leave its part out of a second derivative.
    """
    inputs = tuple(x.view_as(x) for x in inputs)  # so that no path from one to another is counted
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
