"""The weights of a model on their way to files: cast, checked for values that are not finite, compared."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.safetensors_file import TensorSpec, flat_bytes
from tt_ckpt.shown import counted, plain

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_PIECE = 1 << 20  # values that are read, cast, written and compared at once
_VALUES = 1 << 22  # summed at once


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a model under their Hugging Face names: ``specs`` in the best order to read, ``get`` gives one.

    ``pieces`` gives one as ``in_pieces`` does, without the whole in memory if it can; the next piece may overwrite it.
    """

    specs: dict[str, TensorSpec]
    get: Callable[[str], Tensor]
    pieces: Callable[[str], Iterator[Tensor]]
    config: dict[str, Any]
    format: str  # hf, meta, torchtune or gguf
    files: tuple[Path, ...]
    companions: Mapping[str, str] = field(default_factory=dict)  # files to write beside the weights: name -> text

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def family(self) -> str:
        return str(self.config.get("model_type", "unknown"))


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights with floating-point tensors in ``dtype``."""

    def target(spec: TensorSpec) -> torch.dtype:
        return dtype if spec.dtype.is_floating_point else spec.dtype

    return replace(
        weights,
        specs={name: TensorSpec(dtype=target(spec), shape=spec.shape) for name, spec in weights.specs.items()},
        get=lambda name: cast_tensor(name, weights.get(name), target(weights.specs[name])),
        pieces=lambda name: cast_pieces(name, lambda: weights.pieces(name), target(weights.specs[name])),
    )


def cast_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, pieces: Callable[[], Iterable[Tensor]] | None = None
) -> Tensor:
    """``tensor``, one of ``pieces()`` or whole, in ``dtype``; a ValueError if finite values become infinite."""
    result = tensor.to(dtype)
    if result is not tensor and not is_finite(result) and is_finite(tensor):
        count = sum(num_not_finite(one.to(dtype)) for one in (pieces() if pieces else [tensor]))
        raise ValueError(f"{name}: {overflowing(count, dtype)}; choose a wider dtype")
    return result


def cast_pieces(name: str, pieces: Callable[[], Iterator[Tensor]], dtype: torch.dtype) -> Iterator[Tensor]:
    """What ``pieces()`` gives in ``dtype``; a ValueError if finite values become infinite."""
    return (cast_tensor(name, piece, dtype, pieces) for piece in pieces())


def rows_at_once(shape: Sequence[int]) -> tuple[int, int]:
    """How many rows are in a piece of a tensor, and the values in a row."""
    width = max(1, shape[-1] if shape else 1)
    return max(1, _PIECE // width), width


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as matrices of some of its rows each; no copy if it is contiguous."""
    step, width = rows_at_once(tensor.shape)
    return iter(torch.split(tensor.detach().reshape(-1, width), step))


def overflowing(count: int, dtype: torch.dtype) -> str:
    """``2 values overflow float16``."""
    return f"{counted(count, 'value')} {'overflows' if count == 1 else 'overflow'} {str(dtype).removeprefix('torch.')}"


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A finite sum proves it, in one pass that allocates nothing."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize > 1 and bool(torch.isfinite(tensor.detach().sum())):  # 8-bit floats cannot be summed
        return True
    return not any(map(_num_not_finite, _pieces(tensor)))  # or the values are too large to be summed


def num_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    return sum(map(_num_not_finite, _pieces(tensor)))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """All values, some at a time, as floats that can be summed."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _VALUES):
        piece = flat[start : start + _VALUES]
        yield piece.float() if piece.dtype.itemsize == 1 else piece


def _num_not_finite(piece: Tensor) -> int:
    return 0 if bool(torch.isfinite(piece.sum())) else int((~torch.isfinite(piece)).sum())


def compare(written: Weights, meant: Weights, *, where: Path, progress: Callable[[int], None] | None = None) -> None:
    """ValueError that names the tensor, unless both have the same names, shapes, dtypes and bytes."""
    if written.specs.keys() != meant.specs.keys():
        name = sorted(written.specs.keys() ^ meant.specs.keys())[0]
        what = "extra" if name in written.specs else "missing"
        raise ValueError(f"{where}: reading back: {plain(name)} is {what}; please report it")
    for name, spec in written.specs.items():
        pairs = zip(written.pieces(name), meant.pieces(name), strict=True)
        if meant.specs[name] != spec or not all(same_bytes(ours, theirs) for ours, theirs in pairs):
            raise ValueError(f"{where}: reading back: {name} differs from what was written; the disk may be failing")
        if progress:
            progress(spec.nbytes)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal (NaN equals the same NaN, 0.0 is not -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = flat_bytes(a), flat_bytes(b)
    if os.name != "posix" or not x.numel():
        return torch.equal(x, y)
    places = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    # torch.equal of bytes takes several times as long
    return bool(ctypes.CDLL(None).memcmp(*places, ctypes.c_size_t(x.nbytes)) == 0)
