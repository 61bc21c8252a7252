"""Blocks of rows that fit in the cache of a core, and when they may be used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def core_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the second-level cache of a core; 1 MiB if the system does not say."""
    for index in sorted(folder.glob("index*")):
        try:
            level, size = ((index / name).read_text().strip() for name in ("level", "size"))
            if level == "2":
                return int(size.removesuffix("K")) * 2**10
        except (OSError, ValueError):
            continue
    return 2**20


def block_size(cache: int) -> int:
    """Elements of a block: in fp32 one block fills the cache, within bounds.

    Operations on less than 2^16 elements cost more to call than to compute; above 2^18 the calls cost nothing.
    """
    return int(min(max(cache // 4, 2**16), 2**18))


BLOCK = block_size(core_cache())


# bytes: glibc can keep a freed buffer of this size (``man 3 mallopt``, M_MMAP_THRESHOLD), and maps larger ones again
KEPT = 2**25 - 2**16


def by_rows(formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``formula(x)``, which treats each row alone, in fp32, and keeps the shape.

    Without gradient it goes block by block if a buffer of all rows is too large to be kept.
    """
    if torch.is_grad_enabled() or not in_blocks(x) or 4 * x.numel() <= KEPT:
        return formula(x)
    y = torch.empty_like(x, dtype=formula(x.view(-1, x.shape[-1])[:1]).dtype)
    for y_block, x_block in row_blocks(y, x):
        y_block.copy_(formula(x_block))
    return y


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers of up to 32 MB, as it does once one of that size was freed.

    Until then each activation of such a size is mapped, zeroed and unmapped again, layer by layer: a fifth of a forward
    pass of 134M in a fresh process.
    Nothing is written to the buffer, so this costs next to nothing; other allocators just free it.
    """
    torch.empty(KEPT, dtype=torch.uint8, device="cpu")


def has_numbers(x: Tensor) -> bool:
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
    plain = has_numbers(x) or type(x) is _SHAPE
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def in_blocks(*tensors: Tensor) -> bool:
    """Whether ``row_blocks`` may be used: contiguous on a CPU."""
    return all(is_eager(x) and x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def row_blocks(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Two-dimensional views of the same rows of each, as many as have ``size`` elements in the first one."""
    size = (size or BLOCK) if has_numbers(tensors[0]) else tensors[0].numel()
    rows = max(1, size // tensors[0].shape[-1])
    return zip(*(x.view(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)  # type: ignore[no-untyped-call]
