"""Weights on their way to files: comparing them."""

import pytest
import torch

from tt_ckpt.hf.weights import same_bytes


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4097])
def test_every_byte_is_compared(length):
    a = torch.arange(length).to(torch.uint8)
    assert same_bytes(a, a.clone())
    for place in {0, length // 2, length - 1} if length else ():
        other = a.clone()
        other[place] ^= 128
        assert not same_bytes(a, other)
