"""Products on a CPU that torch could do faster: of a few rows in bf16 while decoding, and as large as logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.pages import WORTH_IT, empty_in_huge_pages
from tt_models.rows import is_eager

MOST_ROWS = 16  # benchmarks/models_decode.py: from 32 rows on nothing is won


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, through ``few_rows`` where that is the same and faster.

    Layers of another class than ``nn.Linear`` (adapted, quantized) and layers with hooks are called as they are.
    """
    if not is_plain(layer):
        return layer(x)  # type: ignore[no-any-return]
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]  # not by attribute: this runs for each token
    assert weight is not None
    return few_rows(x, weight, bias) if is_decoding(x, weight) else F.linear(x, weight, bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether it is torch's own linear layer and nobody listens to it."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def is_decoding(x: Tensor, weight: Tensor) -> bool:
    """Whether these are a few rows in bf16 on a CPU, and no gradient is wanted."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with the weight as the left factor, which spares oneDNN a reordering of it."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == x.shape[-1]:
        out = torch.mv(weight, x.reshape(-1))
    else:
        out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out + bias).view(shape)


def is_large_product(x: Tensor, weight: Tensor) -> bool:
    """Whether ``x W^T`` is so large that malloc maps its memory anew, and no gradient is wanted."""
    large = x.numel() // x.shape[-1] * weight.shape[0] * x.element_size() >= WORTH_IT
    if torch.is_grad_enabled() or not large or x.dtype != weight.dtype or type(weight) is not nn.Parameter:
        return False
    return is_eager(x) and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def product_in_huge_pages(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` into ``empty_in_huge_pages``."""
    out = empty_in_huge_pages((*x.shape[:-1], weight.shape[0]), x.dtype)
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, weight.shape[0]))
    return out
