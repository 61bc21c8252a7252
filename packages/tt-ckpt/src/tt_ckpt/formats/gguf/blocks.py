"""Blocks of quantized values, by the ``gguf`` package. Only this module and ``writer.py`` import that package."""

import difflib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


# the largest error of a value, as a share of the largest in its block (of the value itself if there are no blocks), and
# what more it may be: half a step, or a whole one at the end of Q4_0's range, and the rounding of the scale to float16
_ERRORS = {
    "F32": (0.0, 0.0),
    "F16": (2**-11, 2**-25),
    "BF16": (2**-8, 2**-134),
    "Q8_0": (0.5 / 127 + 2**-10, 127 * 2**-25),
    "Q4_0": (1 / 8 + 2**-10, 8 * 2**-25),
}
WRITTEN = tuple(_ERRORS)


@cache
def quant_sizes() -> dict[int, tuple[str, int, int]]:
    """Type number -> name, values per block, bytes per block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ValueError("GGUF files need the gguf package; run: pip install gguf") from None
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def decode(raw: "np.ndarray[Any, Any]", kind: str) -> Tensor:
    if kind in PLAIN:
        return torch.from_numpy(raw).view(PLAIN[kind])
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # a damaged scale is infinite or NaN: the finite check names the tensor
        return torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))


def encode(rows: Tensor, kind: str) -> "np.ndarray[Any, Any]":
    """The bytes of a matrix, a row of blocks for each of its rows."""
    if kind in PLAIN:
        return rows.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quantize

    return quantize(rows.float().contiguous().numpy(), GGMLQuantizationType[kind])


def is_within(found: Tensor, meant: Tensor, kind: str) -> bool:
    """Whether decoded rows differ from those that were encoded by no more than ``kind`` rounds."""
    share, more = _ERRORS[kind]
    width = quant_sizes()[_number(kind)][1]
    meant = meant.float().reshape(-1, width)
    largest = meant.abs().amax(1, keepdim=True)
    return bool(((found.float().reshape(-1, width) - meant).abs() <= largest * share + more).all())


def _number(kind: str) -> int:
    return next(number for number, (name, *_) in quant_sizes().items() if name == kind)


@cache
def can_decode(kind: str) -> bool:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    number = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), dtype=np.uint8), number)
    except NotImplementedError:
        return False
    return True


def nearest_kind(kind: str) -> str:
    from gguf import GGML_QUANT_SIZES

    known = [*PLAIN, *(one.name for one in GGML_QUANT_SIZES if can_decode(one.name))]
    return ", ".join(difflib.get_close_matches(kind, known, 3, 0.0)) + f"; {update_hint()}"


def update_hint() -> str:
    return "pip install -U gguf, or use a file of Q8_0, Q6_K, Q4_K or F16"
