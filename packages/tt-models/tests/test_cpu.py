"""Memory that is freed and taken again."""

import ctypes
import os
import subprocess
import sys

import pytest

MAPPED_BLOCKS = """
import ctypes, sys, torch, tt_models

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks rest".split()]
    _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
if sys.argv[1] == "with":
    tt_models.build(tt_models.LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
before = mallinfo().hblks
activation = torch.empty(2**24, dtype=torch.uint8)
print(mallinfo().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc")
def test_once_a_model_is_built_activations_are_not_mapped_one_by_one():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def mapped_for_an_activation(model):
        words = [sys.executable, "-c", MAPPED_BLOCKS, model]
        return int(subprocess.run(words, env=environment, capture_output=True, check=True, text=True).stdout)

    if mapped_for_an_activation("without") == 0:
        pytest.skip("this allocator maps no buffer of that size by itself")
    assert mapped_for_an_activation("with") == 0
