"""The memory of a tensor as the system sees it: pages that are given, or dropped, many at a time."""

import ctypes
import mmap
import sys
from functools import cache

from torch import Tensor

_POPULATE_WRITE = 23 if sys.platform == "linux" else None  # MADV_POPULATE_WRITE; Python 3.11 has no name for it


def fault_in(tensor: Tensor) -> None:
    """Give a contiguous tensor that is about to be filled its pages, in one call: values do not change.

    New memory otherwise gets them one by one, each when it is first written. Does nothing if the system cannot do it.
    """
    _advise(tensor, _POPULATE_WRITE)


def release_mapped(tensor: Tensor) -> None:
    """Drop the pages of a contiguous view of a private, unchanged memory map from memory, if the system can do so.

    They are read again from the file when they are used again. Other memory would lose its values.
    """
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors on the CPU, of equally many bytes, hold the same bytes."""
    places = ctypes.c_void_p(a.data_ptr()), ctypes.c_void_p(b.data_ptr())
    return a.nbytes == 0 or _library().memcmp(*places, ctypes.c_size_t(a.nbytes)) == 0


def _advise(tensor: Tensor, advice: int | None) -> None:
    if advice is not None and tensor.nbytes:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - begin
        _library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(advice))


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
