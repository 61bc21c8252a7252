"""What large buffers cost a CPU: the pages that the kernel maps and fills with zeros."""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 2**21  # bytes
WORTH_IT = 2**26  # bytes of a buffer that malloc maps anew each time
MADV_HUGEPAGE = 14


def keep_freed_memory() -> None:
    """Let glibc keep buffers of up to 32 MB that were freed, as it does once one of that size was freed.

    Until then every activation of such a size is mapped, zeroed and unmapped again, layer by layer: a fifth of a
    forward on a CPU (benchmarks/models_speed.py; ``man 3 mallopt``, M_MMAP_THRESHOLD). Nothing is written to the
    buffer that this allocates and frees, so it costs microseconds; other allocators just free it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU in pages of 2 MB where Linux has them: what fills it faults 500 times less often.

    For buffers as large as logits that is a fifth of the product that fills them in bf16 (benchmarks/models_speed.py).
    """
    out = torch.empty(shape, dtype=dtype, device="cpu")
    first = -(-out.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (out.data_ptr() + out.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    advise = madvise()
    if advise is not None and length > 0:
        advise(first, length, MADV_HUGEPAGE)  # advice: where it fails, the pages are small ones
    return out


@functools.cache
def madvise() -> Callable[[int, int, int], int] | None:
    """The system call, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
