"""Linear layers with a 4-bit NormalFloat weight, the base of QLoRA: https://arxiv.org/abs/2305.14314.

The weight is torchao's ``NF4Tensor``, with torchao's values; only here is torchao imported, and only when a weight is
quantized. Quantization and dequantization are written out because torchao's are slow on CPU: a bfloat16 number has
65,536 values, and so have two bytes of NF4 codes (four weights), so both directions are one table lookup.
"""

import functools
import importlib
import logging
import math
import sys
import threading
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
_SCALER_BLOCK = 256
_PART = 2048  # blocks quantized at a time: 256 kB of weights, in a cache with all that comes of them
_TILE = 2**17  # codes of two bytes looked up at a time: 1 MB of weights, which a cache holds


@functools.cache
def nf4_tensor_class() -> Any:
    """torchao's ``NF4Tensor``, whose path differs between releases."""
    # torchao warns about each of its extensions that was built for a different Python, and torch about torchao
    levels = [(log, log.level) for log in map(logging.getLogger, ("torchao", "torch.utils._pytree"))]
    for log, _ in levels:
        log.setLevel(logging.ERROR)
    try:
        for place in ("torchao.quantization", "torchao.dtypes.nf4tensor", "torchao.dtypes"):
            try:
                cls = importlib.import_module(place).NF4Tensor
            except (ImportError, AttributeError):
                continue
            _copy_codes(sys.modules[cls.__module__])
            return cls
    finally:
        for log, level in levels:
            log.setLevel(level)
    raise ImportError("this torchao has no NF4Tensor; quantize_base needs torchao >= 0.15: pip install -U torchao")


def _copy_codes(module: Any) -> None:
    """Let ``clone`` (``deepcopy``, ``to(copy=True)``) copy the codes: torchao quantizes anew what it dequantized, which
    changes values, and fails for matrices that have no whole groups of 256 blocks."""
    torchao_to = module.NF4_TORCH_FUNCTIONS[torch.Tensor.to]

    @module.implements([torch.ops.aten.clone.default])  # type: ignore[untyped-decorator]
    def clone(_: Any, args: tuple[Any, ...], kwargs: Any = None) -> Tensor:
        return copy_nf4(args[0])

    @module.implements_torch_function(torch.Tensor.to)  # type: ignore[untyped-decorator]
    def to(weight: Any, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        moved = torchao_to(weight, *args, **kwargs)
        shared = is_nf4(moved) and moved.quantized_data is weight.quantized_data
        return cast(Tensor, moved.clone() if copy and shared else moved)


def is_nf4(weight: Tensor) -> bool:
    return hasattr(weight, "quantized_data")


def check_size(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or weight.numel() % BLOCK:
        shape = list(weight.shape)
        size = f"its size is not a multiple of {BLOCK}"
        raise ValueError(f"{name} {shape} cannot be NF4: {size}; put it in quantize_skip")


def to_nf4(weight: Tensor, *, name: str = "weight") -> Tensor:
    """A matrix as NF4 with double quantization, equal in value to torchao's ``to_nf4``."""
    if is_nf4(weight):
        return weight
    check_size(weight, name)
    codes, absmax = quantize(weight.detach().contiguous().view(-1, BLOCK))
    return from_codes(codes, scales_of(absmax, name=name), weight.shape)


class Scales(NamedTuple):
    """What the codes of a matrix are multiplied with: the scale of each block, itself quantized, and the 16 levels."""

    scalers: Tensor
    factor: Tensor
    mean: Tensor
    levels: Tensor


def quantize(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """uint8[n, 32], two codes to a byte, and the largest magnitude of each block, of ``blocks`` [n, 64]."""
    cls = nf4_tensor_class()
    packed, absmax = _pack(cls, blocks, _levels(cls, blocks.dtype, blocks.device))
    return packed.view(-1, BLOCK // 2), absmax


def scales_of(absmax: Tensor, *, name: str = "weight") -> Scales:
    """The scales of all blocks of a matrix, from the largest magnitude of each; ValueError if one is not finite."""
    cls = nf4_tensor_class()
    if not torch.isfinite(absmax).all():
        raise ValueError(f"{name} has NaN or infinite values: it cannot be quantized")
    # torchao wants whole groups of block scales; small matrices get smaller groups
    group = math.gcd(absmax.numel(), _SCALER_BLOCK)
    scalers, factor, mean = cls.double_quantize_scalers(absmax, 1, group)  # blocks of one: absmax is taken already
    return Scales(scalers, factor, mean, _levels(cls, absmax.dtype, absmax.device))


def from_codes(codes: Tensor, scales: Scales, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """The NF4 matrix that codes and scales make, in ``dtype`` (default: that of the quantized values)."""
    cls = nf4_tensor_class()
    arguments = importlib.import_module(cls.__module__).SubclassTensorArgs
    meta = arguments(shape, (shape[1], 1), 0, dtype or scales.levels.dtype, codes.device, False)
    blocks, group = scales.scalers.numel(), scales.scalers.numel() // scales.factor.numel()
    made = cls(meta, BLOCK, blocks, group, scales.scalers, scales.factor, scales.mean, codes.view(-1),
               nf4=scales.levels)  # fmt: skip
    return cast(Tensor, made)


def _pack(cls: Any, blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes to a byte, and the largest magnitude of each block.

    A part at a time, into memory that was taken first: with larger temporary tensors in between, the heap of a process
    that quantizes a model layer by layer ends up twice as large as the model.
    """
    packed = torch.empty(blocks.numel() // 2, dtype=torch.uint8, device=blocks.device)
    absmax = torch.empty(blocks.shape[0], dtype=blocks.dtype, device=blocks.device)
    for begin in range(0, blocks.shape[0], _PART):
        some = slice(begin, begin + _PART)
        absmax[some] = blocks[some].abs().amax(dim=1)
        scale = absmax[some].where(absmax[some] > 0, 1.0)  # torchao has 0 / 0 here: all-zero blocks stay zero
        codes = _codes(cls, blocks[some] / scale[:, None], levels).flatten()
        packed[begin * BLOCK // 2 : (begin + _PART) * BLOCK // 2] = codes[::2] << 4 | codes[1::2]
    return packed, absmax


def _levels(cls: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 16 values of NF4 as this torchao has them: it makes them anew for each tensor, so ask it with a small one."""
    probe = torch.linspace(-1, 1, BLOCK * 2, dtype=dtype).view(2, BLOCK)
    return cast(Tensor, cls.from_tensor(probe, BLOCK, 2).nf4.to(device))


def _codes(cls: Any, scaled: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, rounded as torchao does: differences in the tensor's own dtype, ties to the lower."""
    if scaled.dtype.itemsize == 2:
        index = scaled.contiguous().view(torch.uint16).flatten().int()
        return _nearest_table(cls, scaled.dtype).to(scaled.device).index_select(0, index)
    upper = torch.bucketize(scaled, levels).clamp_(1, levels.numel() - 1)
    lower = upper - 1
    nearer = (scaled - levels[lower]).abs() <= (scaled - levels[upper]).abs()
    return torch.where(nearer, lower, upper).to(torch.uint8)


@functools.cache
def _nearest_table(cls: Any, dtype: torch.dtype) -> Tensor:
    """The code of every 16-bit number, as torchao computes it."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    return cast(Tensor, cls.quantize_tensor_nearest(numbers, _levels(cls, dtype, torch.device("cpu")))).to(torch.uint8)


def copy_nf4(weight: Any) -> Tensor:
    """A copy of an NF4 matrix."""
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name).clone() for name in names}
    return cast(Tensor, type(weight.detach()).__tensor_unflatten__(parts, context, weight.shape, weight.stride()))


def dequantize(weight: Any, *, reuse: bool = False) -> Tensor:
    """The dense matrix of an NF4 weight, in its dtype; equal to torchao's ``get_original_weight``.

    With ``reuse`` it may be in memory that the next such call on this thread overwrites: use it at once.
    """
    dtype, data = weight.nf4.dtype, weight.quantized_data  # of the stored values; ``model.to(dtype)`` changes the other
    groups = weight.quantized_scalers.view(-1, weight.scaler_block_size)
    scales = (groups / weight.quantization_factor[:, None]).flatten().to(dtype) + weight.scaler_mean
    if torch.compiler.is_compiling():  # plain arithmetic, for the compiler to fuse
        values = weight.nf4[torch.stack([data >> 4, data & 15], dim=-1).int()]
    elif dtype.itemsize == 2 and data.numel() % 2 == 0:
        return _look_up(data.view(torch.uint16), scales, weight, reuse=reuse).to(weight.dtype)
    else:
        values = F.embedding(data.int(), _pairs(weight.nf4))
    dense: Tensor = values.view(-1, weight.block_size).mul_(scales[:, None])
    return dense.view(weight.shape).to(weight.dtype)


def _look_up(codes: Tensor, scales: Tensor, weight: Any, *, reuse: bool) -> Tensor:
    """Four weights of 16 bits at a time, scaled while they are in the cache."""
    if reuse and codes.device.type == "cpu":
        dense = _scratch(codes.numel() * 4, weight.nf4.dtype).view(weight.shape)
    else:
        dense = torch.empty(weight.shape, dtype=weight.nf4.dtype, device=codes.device)
    blocks, quads = dense.view(-1, weight.block_size), dense.view(-1).view(torch.int64)
    table, per_block = _quads(weight.nf4), weight.block_size // 4
    tile = _TILE if codes.device.type == "cpu" else codes.numel()
    for begin in range(0, codes.numel(), tile):
        part = slice(begin, begin + tile)
        torch.index_select(table, 0, codes[part].int(), out=quads[part])
        part = slice(begin // per_block, (begin + tile) // per_block)
        blocks[part] *= scales[part, None]
    return dense


class _Scratch(threading.local):
    """A thread's buffer for dense weights: fresh memory costs more than what is written to it."""

    buffer = torch.empty(0, dtype=torch.bfloat16)


_SCRATCH = _Scratch()


def _scratch(size: int, dtype: torch.dtype) -> Tensor:
    if _SCRATCH.buffer.numel() < size:
        _SCRATCH.buffer = torch.empty(size, dtype=torch.bfloat16)
    return _SCRATCH.buffer[:size].view(dtype)


_TABLES: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}


def _pairs(levels: Tensor) -> Tensor:
    """[256, 2]: the two values of every byte."""
    key = (levels.dtype, levels.device, 2)
    if key not in _TABLES:
        byte = torch.arange(256, device=levels.device)
        _TABLES[key] = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    return _TABLES[key]


def _quads(levels: Tensor) -> Tensor:
    """[65536] of int64: the four 16-bit values of every two bytes, in memory order."""
    key = (levels.dtype, levels.device, 4)
    if key not in _TABLES:
        two = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2).int()
        _TABLES[key] = _pairs(levels)[two.to(levels.device)].flatten(1).view(torch.int64).flatten()
    return _TABLES[key]


def dense(weight: Tensor, *, reuse: bool = False) -> Tensor:
    """The matrix itself, dequantized if it is NF4; ``reuse`` as in ``dequantize``."""
    return dequantize(weight, reuse=reuse) if is_nf4(weight) else weight


class _NF4Linear(torch.autograd.Function):
    """Keeps the quantized weight for the backward, not a dense copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        ctx.weight, ctx.dtype = weight, x.dtype
        x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        return F.linear(x, dequantize(weight, reuse=True).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad_y,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ dequantize(ctx.weight, reuse=True).to(grad_y.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        return grad_x, None, grad_bias


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with W frozen, dense or NF4."""
    if not is_nf4(weight):
        return F.linear(x, weight, bias)
    return cast(Tensor, _NF4Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]
