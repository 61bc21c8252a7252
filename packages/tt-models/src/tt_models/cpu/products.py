"""``linear`` and ``product``: a few rows in bf16, as in decoding, use the product that reads the weight fastest.

Measured by benchmarks/models_decode.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = 16  # of a product in decoding: from 32 rows on nothing is gained


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``.

    Layers of another class than ``nn.Linear`` (adapted, quantized), layers with hooks and layers with a ``forward`` of
    their own are called as they are.
    """
    if type(layer) is not nn.Linear or is_watched(layer):
        return layer(x)  # type: ignore[no-any-return]
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]  # not by attribute: this runs for each token
    assert weight is not None
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as ``linear`` computes it."""
    return few_rows(x, weight, bias) if is_decoding(x, weight) else F.linear(x, weight, bias)


def is_watched(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says, or its weight is not a parameter (FSDP 1)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__ or "weight" not in layer._parameters


def is_decoding(x: Tensor, weight: Tensor) -> bool:
    """Whether these are a few rows in bf16 on a CPU, and no gradient is wanted."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with the weight as the left factor, so that oneDNN need not reorder it."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == x.shape[-1]:
        out = torch.mv(weight, x.reshape(-1))
    else:
        out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out + bias).view(shape)
