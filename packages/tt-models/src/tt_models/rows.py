"""Elementwise formulas over blocks of rows that stay in a core's cache: on a CPU they cost what they read and write."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

BLOCK = 2**16  # elements of a block; benchmarks/models_speed.py


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with memory of its own, neither compiled, distributed nor under torch.func."""
    plain = type(x) is Tensor or type(x) is nn.Parameter
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def in_blocks(*tensors: Tensor) -> bool:
    """Whether ``row_blocks`` may be used: contiguous on a CPU."""
    return all(is_eager(x) and x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def row_blocks(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Two-dimensional views of the same rows of each, as many as have ``size`` elements in the first one."""
    rows = max(1, (size or BLOCK) // tensors[0].shape[-1])
    return zip(*(x.view(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)  # type: ignore[no-untyped-call]


def by_rows(formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``formula(x)``, which treats every row alone and keeps the shape; without gradient, block by block."""
    if torch.is_grad_enabled() or x.numel() <= BLOCK or not in_blocks(x):
        return formula(x)
    y = torch.empty_like(x, dtype=formula(x.view(-1, x.shape[-1])[:1]).dtype)
    for y_block, x_block in row_blocks(y, x):
        y_block.copy_(formula(x_block))
    return y


def gradients_with_graph(
    formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``formula(*inputs)``, None where none is wanted, that can be differentiated again.

    For the backward of a ``torch.autograd.Function`` under ``create_graph``: with ``once_differentiable`` instead,
    ``torch.autograd.grad`` leaves its part out of a second derivative and says nothing.
    """
    inputs = tuple(x.view_as(x) for x in inputs)  # so that no way from one to another is counted
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def keep_freed_memory() -> None:
    """Let glibc keep buffers of up to 32 MB that were freed, as it does once one of that size was freed.

    Until then every activation of such a size is mapped, zeroed and unmapped again, layer by layer: a fifth of a
    forward of 134M in a fresh process (``man 3 mallopt``, M_MMAP_THRESHOLD).
    Nothing is written to the buffer, so this costs next to nothing; other allocators just free it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
