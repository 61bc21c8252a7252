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

from tt_models.limits import LONGEST_KEY, LONGEST_LIST, ROPE_LIMIT, ROPE_LIMITS, out_of_range
from tt_models.shown import listed, shown

# rope_type -> (required keys, optional keys)
ROPE_TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor", "original_max_position_embeddings"}),
        frozenset({"factor", "attention_factor"}),
    ),
}
OLD_NAMES = {"su": "longrope"}
# rope_type -> keys that are ignored: how weights were made, and what the reference of this type does not read
WITHOUT_EFFECT = {
    "default": {"original_max_position_embeddings", "mrope_section"},
    "linear": {"original_max_position_embeddings"},
    "dynamic": {"original_max_position_embeddings"},
    "yarn": {"attn_factor"},
}


def check_rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The normal form of a ``rope_scaling`` mapping: None for plain rope, else ``rope_type`` and its numbers."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be a mapping, got {shown(scaling)}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    every = ", ".join(["default", *ROPE_TYPES])
    if not isinstance(kind, str):
        raise ValueError(f"rope_type must be a name, got {shown(kind)}: known are {every}")
    kind = OLD_NAMES.get(kind, kind)
    without = {"type", "rope_type", "finetuned"} | WITHOUT_EFFECT.get(kind, set())
    numbers = {key: value for key, value in scaling.items() if key not in without and value is not None}
    neutral = {"default": ("factor", 1), "yarn": ("extrapolation_factor", 1)}.get(kind)
    numbers = {key: value for key, value in numbers.items() if (key, value) != neutral}
    if kind == "default":
        if numbers:
            raise ValueError(f"rope_scaling of type 'default' takes no numbers, got {listed(numbers)}")
        return None
    if kind not in ROPE_TYPES:
        close = difflib.get_close_matches(kind[:LONGEST_KEY], [*ROPE_TYPES, "default"], n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else "it is not one of"
        raise ValueError(f"rope_type {shown(kind)} is not supported: {hint} {every}")
    required, optional = ROPE_TYPES[kind]
    missing, unknown = required - numbers.keys(), numbers.keys() - required - optional
    if missing or unknown:
        wrong = [f"lacks {key}" for key in sorted(missing)]
        wrong += [f"does not know {listed(unknown)}"] if unknown else []
        known = ", ".join(sorted(required | optional))
        raise ValueError(f"rope_scaling of type {kind!r} {', '.join(wrong)}; it takes {known}")
    check_rope_numbers(numbers)
    return {"rope_type": kind, **numbers}


def check_rope_numbers(numbers: Mapping[str, Any]) -> None:
    """ValueError for a number that the formulas cannot use."""
    for key, value in numbers.items():
        per_pair = key in ("short_factor", "long_factor")
        values = value if per_pair and isinstance(value, list | tuple) else [value]
        if len(values) > LONGEST_LIST:
            raise ValueError(f"rope_scaling: {key} has {len(values):,} numbers, expected one for each rotated pair")
        numeric = all(type(one) in (int, float) for one in values)
        if key == "truncate" and not isinstance(value, bool):
            raise ValueError(f"rope_scaling: truncate must be true or false, got {shown(value)}")
        if key != "truncate" and (not numeric or per_pair != isinstance(value, list | tuple)):
            kind = "a list of positive numbers" if per_pair else "a positive number"
            raise ValueError(f"rope_scaling: {key} must be {kind}, got {shown(value)}")
        for one in values if key != "truncate" else ():
            wrong = out_of_range(key, one, ROPE_LIMITS.get(key, ROPE_LIMIT))
            if wrong:
                raise ValueError(f"rope_scaling: {wrong}")
    low, high = numbers.get("low_freq_factor", 0.0), numbers.get("high_freq_factor", math.inf)
    if low >= high:
        how = "above" if low > high else "equal to"
        raise ValueError(f"rope_scaling: low_freq_factor {low!r} is {how} high_freq_factor {high!r}")


class Rope:
    """Rotation tables of one kind of layer, ``dim`` being the rotated part of a head."""

    def __init__(
        self, dim: int, *, theta: float, scaling: Mapping[str, Any] | None = None, max_position_embeddings: int = 0
    ) -> None:
        if dim % 2 or dim <= 0:
            raise ValueError(f"rope rotates pairs: the rotated part of a head must be even and positive, got {dim}")
        self.dim, self.theta = dim, float(theta)
        self.scaling = check_rope_scaling(scaling) or {}
        self.max_position_embeddings = max_position_embeddings
        self.kind: str = self.scaling.get("rope_type", "default")
        self.amplitude = amplitude(self.scaling, max_position_embeddings)
        for name in ("short_factor", "long_factor"):
            if name in self.scaling and len(self.scaling[name]) != dim // 2:
                raise ValueError(f"rope_scaling: {name} has {len(self.scaling[name])} numbers, {dim // 2} are needed")
        if self.kind == "dynamic" and dim == 2:
            raise ValueError("rope_scaling of type 'dynamic' needs a rotated part of more than 2 elements, got 2")
        self._frequencies = self.scaled_frequencies()

    @property
    def original_max_positions(self) -> int:
        """The length of the context before it was extended."""
        return int(self.scaling.get("original_max_position_embeddings", self.max_position_embeddings))

    @property
    def by_length(self) -> bool:
        """Whether ``tables`` must know how long each document is."""
        return self.kind in ("dynamic", "longrope")

    def scaled_frequencies(self, factors: str = "short_factor") -> Tensor:
        """fp32[D / 2] on the CPU; longrope has factors for documents within and beyond the original context."""
        frequencies, scaling = torch.reciprocal(torch.pow(self.theta, exponents(self.dim))), self.scaling
        if self.kind == "linear":
            return frequencies / float(scaling["factor"])
        if self.kind == "llama3":
            return llama3_frequencies(frequencies, scaling)
        if self.kind == "yarn":
            return yarn_frequencies(frequencies, self.theta, scaling)
        if self.kind == "longrope":
            return frequencies / torch.tensor(scaling[factors], dtype=torch.float32, device="cpu")
        return frequencies

    def frequencies(self, lengths_BS: Tensor | None, device: torch.device) -> Tensor:
        """fp32[D / 2], or [B, 1, S, D / 2] if it depends on the length of each token's document."""
        frequencies = self._frequencies.to(device)
        if lengths_BS is None or not self.by_length:
            return frequencies
        lengths = lengths_BS[:, None, :, None]
        if self.kind == "longrope":
            slower = self.scaled_frequencies("long_factor").to(device)
            return torch.where(lengths > self.original_max_positions, slower, frequencies)
        factor, longest = float(self.scaling["factor"]), self.max_position_embeddings
        stretch = factor * lengths.clamp(min=longest) / longest - (factor - 1)  # the base grows with the document
        theta = self.theta * stretch ** (self.dim / (self.dim - 2))
        return torch.reciprocal(torch.pow(theta, exponents(self.dim).to(device)))

    def tables(
        self, position_ids_BS: Tensor, dtype: torch.dtype, lengths_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for ``rotate``, [B, 1, S, D] each: computed in fp32, rounded to ``dtype``.

        ``lengths_BS`` is the length of each token's document; it is used only if ``by_length``.
        """
        angles = position_ids_BS[:, None, :, None].float() * self.frequencies(lengths_BS, position_ids_BS.device)
        cos, sin = angles.cos(), angles.sin()
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        cos, sin = cos.to(dtype), sin.to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def exponents(dim: int) -> Tensor:
    """``2 i / dim``, fp32[dim / 2] on the CPU."""
    return torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim


def llama3_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves slowed by ``factor``, short ones kept, a linear blend between (Llama 3.1)."""
    low, high, factor = (float(scaling[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / factor


def yarn_frequencies(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Slow waves divided by ``factor``, fast ones kept, a ramp between: https://arxiv.org/abs/2309.00071."""
    dim = 2 * frequencies.numel()

    def index_of(turns: float) -> float:
        """The index, a real number, of the frequency that makes this many turns in the original context."""
        return dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / 2 / math.log(theta)

    first, last = index_of(scaling.get("beta_fast", 32.0)), index_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last if last != first else first + 0.001
    slow = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0.0, 1.0)
    return (1 - slow) * frequencies + slow * frequencies / float(scaling["factor"])


def amplitude(scaling: Mapping[str, Any], max_position_embeddings: int) -> float:
    """The number by which yarn and longrope multiply cos and sin to keep attention as sharp as it was."""
    kind = scaling.get("rope_type")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        factor = scaling.get("factor", max_position_embeddings / original)
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    log_factor = math.log(max(scaling["factor"], 1.0))
    above, below = float(scaling.get("mscale", 0)), float(scaling.get("mscale_all_dim", 0))
    if above and below:
        return (0.1 * above * log_factor + 1) / (0.1 * below * log_factor + 1)
    return 0.1 * log_factor + 1
