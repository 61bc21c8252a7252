"""Linear layers that read their weight fast where little else is done: a few rows in bf16 on a CPU, while decoding."""

import torch
from torch import Tensor, nn

MOST_ROWS = 16  # benchmarks/models_decode.py: from 32 rows on nothing is won


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, through ``few_rows`` where that is the same and faster.

    Layers of another class than ``nn.Linear`` (adapted, quantized) and layers with hooks are called as they are.
    """
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)  # type: ignore[no-any-return]
    return few_rows(x, layer.weight, layer.bias) if is_decoding(x, layer.weight) else layer(x)


def is_decoding(x: Tensor, weight: Tensor) -> bool:
    """Whether these are a few rows in bf16 on a CPU, and no gradient is wanted."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and type(weight.data) is Tensor
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with the weight as the left factor, which spares oneDNN a reordering of it."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        out = torch.mv(weight, rows[0])
    else:
        out = torch.mm(weight, rows.t()).t().contiguous()
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)
