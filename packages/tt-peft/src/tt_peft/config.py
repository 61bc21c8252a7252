"""The settings of an adapter: :class:`LoRAConfig`."""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

import torch

from tt_peft.names import Patterns
from tt_peft.shown import shown

MOST_RANK = 1 << 17  # no layer of a published model is so narrow in both directions
MOST_ALPHA = 10**9  # published ones have a few thousand
MOST_NAMES = 200_000  # every matrix of every expert of the largest published models is some 70,000
_SHORTER = "name modules by the last part of their names"
Init = Literal["kaiming", "gaussian", "pissa", "loftq"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which modules get an adapter, and of what kind.

    ``target_modules`` is read as PEFT reads it. A list contains names, ``"q_proj"`` or ``"self_attn.q_proj"``: whole
    dotted parts from the right. A string is a regular expression for whole names (``".*(q|v)_proj"``) or, if it matches
    none, one name; ``"all-linear"`` means every linear layer but the output projection and routers of experts.
    ``exclude_modules`` is read likewise. ``modules_to_save`` (modules trained in full beside the adapter),
    ``quantize_skip`` and ``target_parameters`` (stacked weights, such as ``"mlp.experts.gate_up_proj"`` of shape
    [experts, out, in]) are names. ``layers_to_transform`` counts the first number in a name, or with
    ``layers_pattern`` the one behind that name; a full name in ``target_modules`` is adapted in any layer. Keys of
    ``rank_pattern`` and ``alpha_pattern`` are expressions for the last whole parts of a name; the first match decides.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    exclude_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init: Init = "kaiming"
    quantize_base: bool = False
    quantize_skip: tuple[str, ...] = ("lm_head",)
    dtype: torch.dtype | None = None
    """dtype of the trained parameters: adapters and ``modules_to_save``. They compute in the dtype of the base.

    None: that of the base. In fp32 small updates are not lost, whatever the dtype of the base."""

    def __post_init__(self) -> None:
        self._make_tuples()
        _check_number("rank", self.rank)
        _check_number("alpha", self.alpha)
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {shown(self.dropout)}")
        for name in ("rank_pattern", "alpha_pattern"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} must map names to numbers, got {shown(given)}")
            _check_count(name, len(given))
            if not all(isinstance(key, str) and key for key in given):
                raise ValueError(f"{name} must have names or expressions as keys, got {shown(given)}")
        for name in ("use_rslora", "use_dora", "quantize_base"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        for pattern, rank in self.rank_pattern.items():
            _check_number("rank_pattern", rank, pattern)
        for pattern, alpha in self.alpha_pattern.items():
            _check_number("alpha_pattern", alpha, pattern)
        if not (self.target_modules or self.target_parameters):
            raise ValueError("target_modules is empty: name at least one module, such as 'q_proj', or use 'all-linear'")
        if self.init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {shown(self.init)}")
        if self.init == "loftq" and not self.quantize_base:
            raise ValueError("init='loftq' needs quantize_base=True: it starts from what quantization loses")
        if self.init == "pissa" and self.use_dora and self.dropout:
            raise ValueError("init='pissa' with use_dora=True needs dropout=0")
        if self.target_parameters and (self.dropout or self.use_dora or self.init != "kaiming"):
            raise ValueError("target_parameters works with dropout=0, use_dora=False and init='kaiming' only")
        if self.layers_pattern and not self.layers_to_transform:
            given = shown(self.layers_pattern)
            raise ValueError(f"layers_pattern={given} needs layers_to_transform: which of these layers?")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating point type such as torch.float32, got {shown(self.dtype)}")

    def _make_tuples(self) -> None:
        """Lists (from YAML or JSON) become tuples; a single name too, unless it may be an expression."""
        targets = self.target_modules
        is_all = isinstance(targets, str) and targets.lower() == "all-linear"
        if is_all or (isinstance(targets, list | tuple) and [*targets] == ["all-linear"]):
            object.__setattr__(self, "target_modules", "all-linear")
        lists = ["target_parameters", "modules_to_save", "quantize_skip", "layers_pattern"]
        for name in ("exclude_modules", "target_modules"):
            if not getattr(self, name):
                object.__setattr__(self, name, ())
            elif not isinstance(getattr(self, name), str):
                lists.insert(0, name)
        for name in lists:
            value = getattr(self, name)
            several = isinstance(value, Collection) and not isinstance(value, str | Mapping)
            if several:
                _check_count(name, len(value))
            names = (value,) if isinstance(value, str) else tuple(value or ()) if several or not value else (None,)
            if not all(isinstance(n, str) and n for n in names):
                raise ValueError(f"{name} must be names, got {shown(value)}")
            object.__setattr__(self, name, names)
        if self.layers_to_transform is not None:
            given: object = self.layers_to_transform
            layers = tuple(given) if isinstance(given, Sequence) else (given,)
            if not all(type(layer) is int for layer in layers):
                raise ValueError(f"layers_to_transform must be whole numbers, got {shown(given)}")
            object.__setattr__(self, "layers_to_transform", layers)

    @functools.cached_property
    def ranks(self) -> Patterns[int]:
        """``rank_pattern``, ready to be asked for each module."""
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def alphas(self) -> Patterns[float]:
        """``alpha_pattern``, ready to be asked for each module."""
        return Patterns(self.alpha_pattern)

    def scaling(self, rank: int, alpha: float) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (https://arxiv.org/abs/2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def with_(self, **changes: object) -> "LoRAConfig":
        """A copy with some fields changed."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"LoRAConfig has no field {sorted(unknown)[0]!r}")
        return replace(self, **changes)  # type: ignore[arg-type]


def _check_count(name: str, count: int) -> None:
    if count > MOST_NAMES:
        raise ValueError(f"{name} has {count:,} names, expected at most {MOST_NAMES:,}: {_SHORTER}")


def _check_number(name: str, value: object, pattern: str | None = None) -> None:
    is_rank = name.startswith("rank")
    if is_alpha(value) and (not is_rank or (type(value) is int and value <= MOST_RANK)):
        return
    kind, most = ("whole number", f"1 to {MOST_RANK}") if is_rank else ("number", f"at most {MOST_ALPHA}")
    name = name if pattern is None else f"{name}[{shown(pattern)}]"
    raise ValueError(f"{name} must be a positive {kind}, got {shown(value)}: expected {most}")


def is_alpha(value: object) -> bool:
    """Whether it may be an alpha."""
    return type(value) in (int, float) and 0 < value <= MOST_ALPHA  # type: ignore[operator]
