"""Blocks of quantized values, by the ``gguf`` package. Only this module imports that package."""

import difflib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@cache
def quant_sizes() -> dict[int, tuple[str, int, int]]:
    """Type number -> name, values per block, bytes per block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ValueError("GGUF files are read with the gguf package; run: pip install gguf") from None
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def decode(raw: "np.ndarray[Any, Any]", kind: str) -> Tensor:
    if kind in PLAIN:
        return torch.from_numpy(raw).view(PLAIN[kind])
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # a damaged scale is infinite or NaN: the finite check names the tensor
        return torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))


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
