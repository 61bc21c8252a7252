"""Memory that is freed and taken again."""

import os
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, torch, tt_models
torch.set_num_threads(1)
if not {warm}:
    tt_models.auto.keep_freed_memory = lambda: None
sizes = dict(hidden_size=256, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=4)
model = tt_models.build(tt_models.LlamaConfig(vocab_size=64, **sizes))
ids = torch.zeros(1, 1500, dtype=torch.int64)
for turn in range(6):
    if turn == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        model(ids)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_activations_are_not_mapped_again_layer_by_layer():
    def megabytes_mapped(warm):
        words = [sys.executable, "-c", COUNT_FAULTS.format(warm=warm)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return float(subprocess.run(words, env=environment, capture_output=True, check=True, text=True).stdout)

    cold, warm = megabytes_mapped(warm=False), megabytes_mapped(warm=True)
    assert warm < (cold / 4 if cold >= 20 else 20)  # below 20, the allocator keeps freed memory anyway
