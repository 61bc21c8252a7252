"""Memory that is freed and taken again, and memory in large pages."""

import os
import subprocess
import sys

import pytest
import torch

import tt_models
from tt_models.linear import is_large_product, product_in_huge_pages

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
    if cold < 20:
        pytest.skip("this allocator keeps freed memory anyway")
    assert warm < cold / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_large_logits_are_the_same_logits(dtype, tied, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tt_models.LlamaConfig(vocab_size=1000, tie_word_embeddings=tied, **sizes)
    model, ids = tt_models.build(config, dtype=dtype), torch.randint(0, 1000, (2, 1200))
    expected = model(ids)
    monkeypatch.setattr(tt_models.linear, "WORTH_IT", 2**22)
    taken = []
    real = tt_models.decoder.product_in_huge_pages
    monkeypatch.setattr(tt_models.decoder, "product_in_huge_pages", lambda *args: taken.append(1) or real(*args))
    assert model(ids).equal(expected)
    assert not taken  # a gradient is wanted
    with torch.no_grad():
        assert model(ids).equal(expected)
    assert taken


def test_large_products_want_plain_tensors(monkeypatch):
    monkeypatch.setattr(tt_models.linear, "WORTH_IT", 64)
    weight, x = torch.nn.Parameter(torch.randn(8, 4)), torch.randn(2, 4)
    with torch.no_grad():
        assert is_large_product(x, weight)
        assert product_in_huge_pages(x, weight).equal(x @ weight.T)
        assert not is_large_product(x[:1], weight)
        assert not is_large_product(x.double(), weight)
        with torch.autocast("cpu"):
            assert not is_large_product(x, weight)
