"""``linear`` and ``product``: a few rows in bf16, as in decoding, use the product that reads the weight fastest.

Instructions that multiply bf16 (avx512_bf16, AMX) want a weight in pairs of its columns, so each product rearranges it,
which takes longer than the product of a few rows. With avx512_bf16 a long generation keeps rearranged copies
(``Packed``), and without a copy F.linear is the fastest. With AMX the weight is read as the left factor, which is not
rearranged. On any other CPU F.linear is as fast as both. Measured by the suite decode of benchmarks/.
"""

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tt_models.limits import total_memory, weight_bytes

MOST_ROWS = 16  # of a product in decoding: from 32 rows on nothing is gained
MOST_PACKED_ROWS = 64  # at 128 rows a packed weight saves 5 % of a product

Kernel = Literal["amx", "avx512_bf16", "other"]


@functools.cache
def kernel() -> Kernel:
    """The instructions by which oneDNN multiplies bf16 here, of those that want the weight rearranged."""
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "other"
    narrowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    every = narrowed in ("", "ALL", "DEFAULT") or "AMX" in narrowed or narrowed.startswith("AVX10")
    if torch.cpu._is_amx_tile_supported() and every:
        return "amx"
    bf16 = every or narrowed in ("AVX512_CORE_BF16", "AVX512_CORE_FP16")
    return "avx512_bf16" if bf16 and torch.cpu._is_avx512_bf16_supported() else "other"


class Packed:
    """Rearranged copies of the weights that a model's decoding reads, made when they are first read.

    A product by a copy has the bits of F.linear. Model and copies together take at most half of the machine's memory.
    """

    def __init__(self, model: nn.Module) -> None:
        total = total_memory(torch.device("cpu"))
        self.room = total // 2 - weight_bytes(model) if total is not None and kernel() == "avx512_bf16" else 0
        self.copies: dict[int, tuple[list[Tensor], list[int], Tensor | None]] = {}  # weights, their state, the copy
        self.held: list[Tensor] = []  # the memory of these weights, so that no other weight is put at its address

    def copy_of(self, *weights: Tensor) -> Tensor | None:
        """The copy of weights that share their input; None if it does not fit, or if they have changed since."""
        if weights[0].is_inference():  # such a tensor does not count its changes
            return None
        if id(weights[0]) not in self.copies:
            copy, nbytes = None, sum(weight.nbytes for weight in weights)
            if nbytes <= self.room:
                self.room -= nbytes
                together = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
                copy = torch.ops.mkldnn._reorder_linear_weight(together, MOST_ROWS)
            self.copies[id(weights[0])] = list(weights), _state(weights), copy
            self.held += [weight.detach() for weight in weights]
        kept, state, copy = self.copies[id(weights[0])]
        same = len(kept) == len(weights) and all(a is b for a, b in zip(kept, weights, strict=True))
        return copy if same and _state(weights) == state else None


_steps = 0  # of all optimizers: torch's fused ones change weights without a new version


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _state(weights: Sequence[Tensor]) -> list[int]:
    """What is another number once weights have changed, by whatever but an operation on their ``data`` in place."""
    return [_steps, *[weight._version for weight in weights], *[weight.data_ptr() for weight in weights]]


_READ = threading.local()


@contextmanager
def reading(packed: Packed | None) -> Iterator[None]:
    """Inside, this thread's products of a few rows use these copies."""
    before = getattr(_READ, "packed", None)
    _READ.packed = packed
    try:
        yield
    finally:
        _READ.packed = before


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


def linears(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """``layer(x)`` of each: one product if their weights are packed together."""
    packed: Packed | None = getattr(_READ, "packed", None)
    if packed is not None and not any(type(layer) is not nn.Linear or is_watched(layer) for layer in layers):
        weights = [weight for layer in layers if (weight := layer._parameters["weight"]) is not None]
        biased = any(layer._parameters["bias"] is not None for layer in layers)
        if not biased and all(is_decoding(x, weight) and not weight.is_inference() for weight in weights):
            copy = packed.copy_of(*weights)
            if copy is not None:
                return torch.split(by_copy(x, copy, None), [len(weight) for weight in weights], dim=-1)
    return [linear(layer, x) for layer in layers]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as ``linear`` computes it."""
    return few_rows(x, weight, bias) if is_decoding(x, weight) else F.linear(x, weight, bias)


def is_watched(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says, or its weight is not a parameter (FSDP 1)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__ or "weight" not in layer._parameters


def is_decoding(x: Tensor, weight: Tensor) -> bool:
    """Whether these are a few rows in bf16 on a CPU, and no gradient is wanted."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or x.numel() > MOST_PACKED_ROWS * x.shape[-1]:
        return False
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` by a copy of the weight, or with the weight as the left factor, or as it is."""
    packed: Packed | None = getattr(_READ, "packed", None)
    copy = None if packed is None else packed.copy_of(weight)
    if copy is not None:
        return by_copy(x, copy, bias)
    if kernel() != "amx" or x.numel() > MOST_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return weight_left(x, weight, bias)


def by_copy(x: Tensor, copy: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``; the same bits as F.linear."""
    return torch.ops.mkldnn._linear_pointwise.default(x, copy, bias, "none", [], "")  # type: ignore[no-any-return]


def weight_left(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as the transposed ``W x^T``."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == x.shape[-1]:
        out = torch.mv(weight, x.reshape(-1))
    else:
        out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out + bias).view(shape)
