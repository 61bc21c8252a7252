"""``x W^T + b`` without gradient, of a base that does not train.

In fp32 it is oneDNN's on CPUs that have AVX-512 and are not Intel's, since torch's MKL uses AVX2 there. tt_models has
the same rule for models; this package works without it.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH = 2**22  # multiplications from which oneDNN is faster


@functools.cache
def fp32_by_onednn() -> bool:
    """Whether oneDNN may use AVX-512 and MKL does not."""
    cpu = torch.cpu.get_capabilities()
    named = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    allowed = named in ("", "ALL", "DEFAULT") or named.startswith(("AVX512", "AVX10"))
    both = torch._C.has_mkl and torch._C._has_mkldnn
    return both and allowed and bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of x [rows, in] and W [out, in]; F.linear if a gradient is wanted."""
    large = x.dtype == weight.dtype == torch.float32 and x.shape[0] * weight.numel() >= WORTH
    plain = all(type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" for each in (x, weight))
    watched = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    if watched or not (large and plain and fp32_by_onednn()):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
