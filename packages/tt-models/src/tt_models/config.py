"""Model configurations: frozen dataclasses with the field names of ``config.json``, read strictly and written back."""

import copy
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from tt_models.config_keys import (
    COMPUTED,
    FIELD_OF,
    OFF,
    fits,
    has_no_effect,
    nearest,
    pop_quantization,
    refuse_unlike,
    refuse_wrong_types,
    split_rope_parameters,
    with_original_length,
)
from tt_models.limits import LIMITS, LONGEST_LIST, MOST_EXPERTS, out_of_range
from tt_models.mlp import ACTIVATIONS
from tt_models.rope import Rope, check_rope_scaling
from tt_models.shown import shown

FULL, SLIDING = "full_attention", "sliding_attention"
QK_NORM = dict.fromkeys(("use_qk_norm", "qk_norm", "use_qk_layernorm", "qk_layernorm"), (True,))  # see computed
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
WINDOW_KEYS = ("sliding_window", "sliding_window_size")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has. A family adds its own fields and overrides defaults with those of its reference."""

    model_type: ClassVar[str] = ""
    architecture: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}  # other spellings in config.json -> field
    written: ClassVar[Mapping[str, Any]] = {}  # keys that the reference reads and that have one value here
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # keys that are not fields -> the values that are computed

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_values()
        self._fill("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "choose one that is, or give head_dim"
            )
        self._fill("head_dim", self.hidden_size // self.num_attention_heads)
        self._fill("rope_scaling", check_rope_scaling(self.rope_scaling))
        self._check()
        # refuses what its formulas cannot compute, before weights are loaded
        theta, longest = self.rope_theta, self.max_position_embeddings
        Rope(self.rotated_dim, theta=theta, scaling=self.rope_scaling, max_position_embeddings=longest)

    def _fill(self, name: str, value: Any) -> None:
        """Set a field of this frozen object if it is None, or if ``value`` is its normal form."""
        if getattr(self, name) is None or name == "rope_scaling":
            object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        """Every field has its type, and every number is one that a model may have."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) > LONGEST_LIST:
                raise ValueError(f"{name} has {len(value):,} elements, expected at most {LONGEST_LIST:,}")
        refuse_wrong_types(values, typing.get_type_hints(type(self)))
        for name, limits in LIMITS.items():
            found = values.get(name)
            for value in found if isinstance(found, tuple | list) else () if found is None else (found,):
                wrong = out_of_range(name, value, limits)
                if wrong:
                    raise ValueError(wrong)

    def _check(self) -> None:
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotated_dim % 2 or self.rotated_dim <= 0:
            raise ValueError(
                f"head_dim {self.head_size}: rope rotates pairs, so {self.rotated_dim} of a head cannot be rotated; "
                "expected an even number"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {nearest(self.hidden_act, ACTIVATIONS)}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside vocab_size {self.vocab_size}")

    @property
    def kv_heads(self) -> int:
        """``num_key_value_heads``, which is an int once the config is made."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """``head_dim``, which is an int once the config is made."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def rotated_dim(self) -> int:
        """How many elements of a head are rotated."""
        return self.head_size

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens back it sees (itself included); None: all."""
        return (getattr(self, "sliding_window", None),) * self.num_hidden_layers

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rope in the spelling of transformers 5."""
        return {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a ``config.json``; see ``tt_models.config_from_hf``."""
        hints = typing.get_type_hints(cls)
        names = {field.name for field in dataclasses.fields(cls)}
        passed = {key for key in config if isinstance(key, str) and key not in names and has_no_effect(key)}
        keys = {key: value for key, value in config.items() if key not in passed | {"model_type"}}
        pop_quantization(keys)
        cls.complete_rope(keys)
        keys |= cls.read_rope({key: keys.pop(key) for key in ROPE_KEYS if key in keys})
        for alias, name in cls.aliases.items():
            value = keys.pop(alias, None)
            if value is not None and keys.get(name) is None:
                keys[name] = value
            elif value is not None and keys[name] != value:
                raise ValueError(f"config.json: {alias} = {shown(value)} contradicts {name} = {shown(keys[name])}")
        known: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in keys.items()
            if key in names and (value is not None or fits(None, hints[key]))  # null: not set, so the default
        }
        made = cls(**known)
        rest = {key: keys[key] for key in keys if key not in names and not made._is_whole_window(key, keys[key])}
        computed = {key: values for key in rest if (values := made.computed_values(key)) is not None}
        refuse_unlike(rest, computed, names | {*ROPE_KEYS, *cls.aliases}, model_type=cls.model_type)
        return made

    def computed_values(self, key: str) -> tuple[Any, ...] | None:
        """The values of ``key``, which is not a field, that say what is computed; None if that is not known."""
        if key in self.computed:
            return self.computed[key]
        if key in FIELD_OF:
            return (getattr(self, FIELD_OF[key]),)
        windows = {window for window in self.layer_windows if window and window < self.max_position_embeddings}
        if key in WINDOW_KEYS:
            return (min(windows),) if windows else OFF
        if key == "use_sliding_window":
            return (bool(windows),)
        if key == "layer_types":
            return ([SLIDING if window else FULL for window in self.layer_windows],)
        if key == "no_rope_layers":
            return ([1] * self.num_hidden_layers, [])
        if key == "initial_context_length":
            original = (self.rope_scaling or {}).get("original_max_position_embeddings", self.max_position_embeddings)
            return (original,)
        if key == "attention_multiplier":
            return (self.head_size**-0.5,)
        return COMPUTED.get(key)

    def _is_whole_window(self, key: str, value: Any) -> bool:
        """Whether this is a window that hides nothing."""
        return key in WINDOW_KEYS and type(value) is int and value >= self.max_position_embeddings

    @classmethod
    def complete_rope(cls, keys: dict[str, Any]) -> None:
        """Give a rope without an original context length the one beside it in the file, else the longest."""
        beside = None
        if "original_max_position_embeddings" not in cls.__dataclass_fields__:
            beside = keys.pop("original_max_position_embeddings", None)
        longest = keys.get("max_position_embeddings") or cls.max_position_embeddings
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(keys.get(name), Mapping):
                keys[name] = with_original_length(keys[name], beside, longest)

    @classmethod
    def read_rope(cls, keys: Mapping[str, Any]) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling`` from either generation of config.json."""
        return split_rope_parameters(keys)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model; see ``tt_models.config_to_hf``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        plain |= {alias: plain[name] for alias, name in self.aliases.items()}
        plain |= {"rope_parameters": self.rope_parameters}
        head = {"architectures": [self.architecture], "model_type": self.model_type, **self.written}
        return copy.deepcopy(head | plain)


@dataclass(frozen=True, kw_only=True)
class LayeredConfig(ModelConfig):
    """A config whose layers are of two kinds, ``full_attention`` and ``sliding_attention``."""

    sliding_window: int | None = None  # tokens that a sliding layer sees back, itself included
    layer_types: tuple[str, ...] | None = None  # None: the family's own pattern

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers or {*self.layer_types} - {FULL, SLIDING}:
            raise ValueError(
                f"layer_types must be {FULL!r} or {SLIDING!r} for each of {self.num_hidden_layers} layers, "
                f"got {shown(self.layer_types)}"
            )
        if SLIDING in self.layer_types and self.window is None and self.sliding_window is not None:
            raise ValueError(
                f"layer_types has {SLIDING} layers, but use_sliding_window is false: set it to true, or make every "
                f"layer {FULL}"
            )
        if self.layer_types == self.usual_layer_types():
            object.__setattr__(self, "layer_types", None)  # so that replace(config, num_hidden_layers=...) works

    def usual_layer_types(self) -> tuple[str, ...]:
        """The family's own pattern: here, every second layer sees everything."""
        return tuple(FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return self.layer_types or self.usual_layer_types()

    @property
    def window(self) -> int | None:
        """The window of sliding layers, if it is used."""
        return self.sliding_window if getattr(self, "use_sliding_window", True) else None

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens back it sees (itself included); None: all."""
        return tuple(self.window if kind == SLIDING else None for kind in self.layer_kinds)

    def to_hf(self) -> dict[str, Any]:
        """With the kind of each layer."""
        return super().to_hf() | {"layer_types": list(self.layer_kinds)}


def check_experts(config: Any, num_experts: int) -> None:
    """ValueError if a token, or a model, cannot have that many experts."""
    if config.num_experts_per_tok > num_experts:
        found = config.num_experts_per_tok
        raise ValueError(f"num_experts_per_tok must be between 1 and the {num_experts} experts, got {found}")
    if num_experts * config.num_hidden_layers > MOST_EXPERTS:
        raise ValueError(
            f"{num_experts} experts in each of num_hidden_layers {config.num_hidden_layers} are more than "
            f"{MOST_EXPERTS}, ten times what any published model has"
        )


C = TypeVar("C", bound=ModelConfig)


def sized(config: C, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **other: Any) -> C:
    """``config`` with the numbers of one size; ``head_dim`` is ``hidden / heads`` unless among the ``other`` fields."""
    numbers: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
    }
    return dataclasses.replace(config, **numbers | other)
