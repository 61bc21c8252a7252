"""Pages of tensors: given at once, dropped, compared."""

import sys
from pathlib import Path

import pytest
import torch

from tt_ckpt.pages import fault_in, same_memory

MB = 2**20


def own_memory():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def gives_pages():
    if sys.platform != "linux":
        return False
    import platform

    return tuple(int(part) for part in platform.release().split(".")[:2]) >= (5, 14)


@pytest.mark.skipif(not gives_pages(), reason="Linux 5.14 gives pages of memory that is about to be written")
def test_new_memory_has_its_pages_before_it_is_written():
    tensor = torch.empty(256 * MB, dtype=torch.uint8)  # larger than what malloc keeps: new memory
    before = own_memory()
    fault_in(tensor)
    assert own_memory() - before > 250 * MB


def test_memory_that_is_given_its_pages_keeps_the_values_in_it_and_around_it():
    values = torch.arange(100_000)
    fault_in(values[1001:70_003])
    fault_in(values[:0])
    assert torch.equal(values, torch.arange(100_000))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4097])
def test_every_byte_is_compared(length):
    a = torch.arange(length).to(torch.uint8)
    assert same_memory(a, a.clone())
    for place in {0, length // 2, length - 1} if length else ():
        other = a.clone()
        other[place] ^= 128
        assert not same_memory(a, other)
