"""Rotary position embeddings in the rotate-half layout: https://arxiv.org/abs/2104.09864, and their context extensions.

Frequencies are plain attributes, made on the CPU in fp32 when the model is built, and never buffers: a model that was
built on the meta device and materialized later needs no repair. B: batch, S: sequence, D: rotated part of a head.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# rope_type -> (keys that must be there, keys that may be there)
ROPE_TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
}


def check_rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The normal form of a ``rope_scaling`` mapping: None for plain rope, else ``rope_type`` and its numbers."""
    if scaling is None:
        return None
    numbers = {key: value for key, value in scaling.items() if key not in ("type", "rope_type") and value is not None}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        if numbers:
            raise ValueError(f"rope_scaling of type 'default' takes no numbers, got {', '.join(sorted(numbers))}")
        return None
    if kind not in ROPE_TYPES:
        close = difflib.get_close_matches(str(kind), [*ROPE_TYPES, "default"], n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else "known are"
        raise ValueError(f"rope_type {kind!r} is not supported: {hint} {', '.join(['default', *ROPE_TYPES])}")
    required, optional = ROPE_TYPES[kind]
    missing, unknown = required - numbers.keys(), numbers.keys() - required - optional
    if missing or unknown:
        wrong = [f"lacks {key}" for key in sorted(missing)] + [f"does not know {key}" for key in sorted(unknown)]
        raise ValueError(
            f"rope_scaling of type {kind!r} {', '.join(wrong)}; it takes {', '.join(sorted(required | optional))}"
        )
    return {"rope_type": kind, **numbers}


class Rope:
    """Rotation tables of one kind of layer, ``dim`` being the rotated part of a head."""

    def __init__(
        self, dim: int, *, theta: float, scaling: Mapping[str, Any] | None = None, max_position_embeddings: int = 0
    ) -> None:
        self.dim, self.theta = dim, theta
        self.scaling = check_rope_scaling(scaling)
        self.max_position_embeddings = max_position_embeddings
        self.kind: str = (self.scaling or {}).get("rope_type", "default")
        self._frequencies = self.frequencies(0)

    def frequencies(self, seq_len: int) -> Tensor:
        """fp32[dim / 2] on the CPU, for a sequence of ``seq_len`` tokens."""
        theta, scaling = self.theta, self.scaling or {}
        if self.kind == "dynamic":
            stretch = scaling["factor"] * max(seq_len, self.max_position_embeddings) / self.max_position_embeddings
            theta *= (stretch - (scaling["factor"] - 1)) ** (self.dim / (self.dim - 2))
        frequencies = plain_frequencies(self.dim, theta)
        if self.kind == "linear":
            frequencies = frequencies / scaling["factor"]
        if self.kind == "llama3":
            frequencies = llama3_frequencies(frequencies, scaling)
        return frequencies

    def tables(self, position_ids_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, 1, S, D / 2] each: computed in fp32, rounded to ``dtype``."""
        frequencies = self._frequencies
        if self.kind == "dynamic":
            frequencies = self.frequencies(int(position_ids_BS.max()) + 1)
        angles = position_ids_BS[:, None, :, None].float() * frequencies.to(position_ids_BS.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def plain_frequencies(dim: int, theta: float) -> Tensor:
    """``theta ** (-2 i / dim)``."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return torch.reciprocal(theta**exponents)


def llama3_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves slowed by ``factor``, short ones kept, a linear blend between (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rotate(x_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + D / 2])`` of the first D elements of each head by their angle."""
    half = cos.shape[-1]
    first, second, rest = x_BHSD[..., :half], x_BHSD[..., half : 2 * half], x_BHSD[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
