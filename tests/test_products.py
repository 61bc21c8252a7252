"""tt_models and tt_peft decide alike which library multiplies fp32: neither imports the other."""

import pytest
import torch

from tt_models.cpu import products
from tt_peft import product


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel Xeon"])
@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("narrowed", [None, "ALL", "AVX2", "AVX512_CORE", "avx512_core_bf16", "AVX10_1_512"])
def test_both_packages_multiply_fp32_by_the_same_library(name, avx512, narrowed, monkeypatch):
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    if narrowed:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", narrowed)
    cpu = {"avx512_f": avx512, "cpu_name": name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert product.fp32_by_onednn.__wrapped__() == products.fp32_by_onednn(cpu)
