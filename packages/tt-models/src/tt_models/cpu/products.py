"""``linear``, ``product`` and ``multiply_``: a product is done by the library that is fastest at it on this CPU.

In bf16 this is F.linear but for a few rows without gradient, as in decoding: they take as long as reading the weight.
Instructions that multiply bf16 (avx512_bf16, AMX) want a weight in pairs of its columns, so each product rearranges it,
which takes longer than the product of a few rows. With avx512_bf16 a long generation keeps rearranged copies
(``Packed``), and without a copy F.linear is the fastest. With AMX the weight is read as the left factor, which is not
rearranged. On any other CPU F.linear is as fast as both. Measured by the suite decode of benchmarks/.

In fp32 oneDNN is faster than MKL on some CPUs (``fp32_by_onednn``), for one row as well, which needs no copy.
"""

import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tt_models.cpu.blocks import has_numbers, is_eager
from tt_models.limits import total_memory, weight_bytes

MOST_ROWS = 16  # of a product in decoding: from 32 rows on nothing is gained
MOST_PACKED_ROWS = 64  # at 128 rows a packed weight saves 5 % of a product
PACK_FROM = 24  # steps: packing takes as long as it saves in about twelve
FEWEST_ROWS = 4  # from which oneDNN is faster in fp32 with gradients
FEWEST_PACKED_ROWS = 3  # in fp32: fewer rows are as fast by the weight itself
BUFFER = 2**21  # elements of a result on its way to another place
WORTH = 2**22  # multiplications from which it pays for compiling a product for a new number of rows, in eight layers

Kernel = Literal["amx", "avx512_bf16", "other"]


@functools.cache
def kernel() -> Kernel:
    """The instructions by which oneDNN multiplies bf16 here, of those that want the weight rearranged."""
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "other"
    narrowed, every = _narrowed()
    every = every or "AMX" in narrowed or narrowed.startswith("AVX10")
    if torch.cpu._is_amx_tile_supported() and every:
        return "amx"
    bf16 = every or narrowed in ("AVX512_CORE_BF16", "AVX512_CORE_FP16")
    return "avx512_bf16" if bf16 and torch.cpu._is_avx512_bf16_supported() else "other"


def _narrowed() -> tuple[str, bool]:
    """The instructions that oneDNN may use at most, and whether these are all."""
    named = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return named, named in ("", "ALL", "DEFAULT")


def fp32_by_onednn(cpu: Mapping[str, Any]) -> bool:
    """Whether oneDNN may use AVX-512 and MKL does not, on a CPU with ``torch.cpu.get_capabilities()``."""
    narrowed, every = _narrowed()
    allowed = every or narrowed.startswith(("AVX512", "AVX10"))
    both = torch._C.has_mkl and torch._C._has_mkldnn
    return both and allowed and bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


BY_ONEDNN = frozenset([torch.float32] if fp32_by_onednn(torch.cpu.get_capabilities()) else [])


def packs(dtype: torch.dtype) -> bool:
    """Whether a copy of a weight of this dtype is faster than the weight."""
    return dtype in BY_ONEDNN or (dtype == torch.bfloat16 and kernel() == "avx512_bf16")


def reads_copy(dtype: torch.dtype, rows: int) -> bool:
    """Whether a product of so many rows is faster by a copy, if ``packs(dtype)``."""
    return rows <= MOST_PACKED_ROWS and (dtype != torch.float32 or rows >= FEWEST_PACKED_ROWS)


class Packed:
    """Rearranged copies of the weights that a model's decoding reads, made when they are first read.

    A product by a copy has the bits of F.linear in bf16. Model and copies together take at most half of the machine's
    memory.
    """

    def __init__(self, model: nn.Module) -> None:
        total = total_memory(torch.device("cpu"))
        self.room = 0 if total is None else total // 2 - weight_bytes(model)
        self.copies: dict[int, tuple[list[Tensor], list[int], Tensor | None]] = {}  # weights, their state, the copy
        self.held: list[Tensor] = []  # the memory of these weights, so that no other weight is put at its address

    def copy_of(self, *weights: Tensor) -> Tensor | None:
        """The copy of weights that share their input; None if it does not fit, or if they have changed since."""
        if weights[0].is_inference():  # such a tensor does not count its changes
            return None
        if id(weights[0]) not in self.copies:
            copy, nbytes = None, sum(weight.nbytes for weight in weights)
            if nbytes <= self.room and packs(weights[0].dtype):
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


def being_read() -> Packed | None:
    """What this thread is ``reading`` now."""
    return getattr(_READ, "packed", None)


@contextmanager
def reading(packed: Packed | None) -> Iterator[None]:
    """Inside, this thread's products of a few rows use these copies."""
    before = being_read()
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
    packed = being_read()
    if (
        packed is not None
        and not torch.is_grad_enabled()
        and not any(type(layer) is not nn.Linear or is_watched(layer) for layer in layers)
    ):
        weights = [weight for layer in layers if (weight := layer._parameters["weight"]) is not None]
        biased = any(layer._parameters["bias"] is not None for layer in layers)
        few = reads_copy(x.dtype, x.numel() // x.shape[-1])
        if few and not biased and all(is_plain(x, weight) and not weight.is_inference() for weight in weights):
            copy = packed.copy_of(*weights)
            if copy is not None:
                return torch.split(by_onednn(x, copy, None), [len(weight) for weight in weights], dim=-1)
    return [linear(layer, x) for layer in layers]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as ``linear`` computes it."""
    if not is_plain(x, weight):
        return F.linear(x, weight, bias)
    rows, packed = x.numel() // x.shape[-1], being_read()
    large = x.dtype in BY_ONEDNN and rows >= FEWEST_ROWS and rows * weight.numel() >= WORTH
    if torch.is_grad_enabled():
        return _ByOneDNN.apply(x, weight, bias) if large else F.linear(x, weight, bias)  # type: ignore[no-untyped-call]
    copy = packed.copy_of(weight) if packed is not None and reads_copy(x.dtype, rows) else None
    if copy is not None:
        return by_onednn(x, copy, bias)
    few = x.dtype in BY_ONEDNN and rows < FEWEST_ROWS
    if (few and rows == 2) or (x.dtype == torch.bfloat16 and rows <= MOST_ROWS and kernel() == "amx"):
        return weight_left(x, weight, bias)
    if large or few:
        return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def is_watched(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says, or its weight is not a parameter (FSDP 1)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__ or "weight" not in layer._parameters


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product on a CPU in a dtype in which F.linear is not always the fastest."""
    if x.dtype != weight.dtype or x.device.type != "cpu" or type(weight) is not nn.Parameter:
        return False
    known = x.dtype == torch.bfloat16 or x.dtype in BY_ONEDNN
    return known and not torch.is_autocast_enabled("cpu") and is_eager(x)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` of a weight as it is, or of its copy; in bf16 the same bits as F.linear."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _ByOneDNN(torch.autograd.Function):
    """``by_onednn``, and its gradients by the same product of transposed factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        times: Any = F.linear if torch.is_grad_enabled() else by_onednn  # the former can be differentiated again
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        x_RI, grad_RO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            times(grad, weight.t(), None) if needs_x else None,
            times(grad_RO.t(), x_RI.t(), None) if needs_weight else None,
            grad_RO.sum(0) if needs_bias else None,
        )


def multiply_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """``out = a b``, or with ``add`` ``out += a b``, of matrices; without gradient, and returned."""
    known = a.dtype in BY_ONEDNN and b.dtype == a.dtype and a.device.type == "cpu" and len(a) * b.numel() >= WORTH
    if not known or not all(is_eager(each) and has_numbers(each) for each in (a, b)):
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    each = max(FEWEST_ROWS, BUFFER // out.shape[1])
    for out_rows, a_rows in zip(out.split(each), a.split(each), strict=True):  # type: ignore[no-untyped-call]
        made = by_onednn(a_rows, b.t(), None)
        out_rows.add_(made) if add else out_rows.copy_(made)
    return out


def weight_left(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as the transposed ``W x^T``."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == x.shape[-1]:
        out = torch.mv(weight, x.reshape(-1))
    else:
        out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out + bias).view(shape)
