"""Model configurations: frozen dataclasses with the field names of ``config.json``, read strictly and written back."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from tt_models.mlp import ACTIVATIONS
from tt_models.rope import check_rope_scaling

# Keys of config.json that leave the logits as they are: provenance, generation and serving settings, other heads.
WITHOUT_EFFECT = frozenset(
    [
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_name_or_path", "architectures", "attn_implementation", "auto_map", "bad_words_ids",
        "begin_suppress_tokens", "bos_token", "cache_implementation", "decoder_start_token_id",
        "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
        "eos_token", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_llama_config",
        "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "min_length",
        "model_max_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_beam_groups", "num_beams",
        "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
        "output_router_logits", "output_scores", "pad_token", "prefix", "pretraining_tp", "problem_type",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "tie_encoder_decoder", "tokenizer_class",
        "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version",
        "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    ]
)  # fmt: skip

# Keys that change the maths in general and are harmless at one value.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has. A family adds its own fields and overrides defaults with those of its reference."""

    model_type: ClassVar[str] = ""
    architecture: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}  # other spellings in config.json -> field

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
        self._fill("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "choose one that is, or give head_dim"
            )
        self._fill("head_dim", self.hidden_size // self.num_attention_heads)
        self._fill("rope_scaling", check_rope_scaling(self.rope_scaling))
        self._check()

    def _fill(self, name: str, value: Any) -> None:
        """Set a field of this frozen object where it is None, or where ``value`` is its normal form."""
        if getattr(self, name) is None or name == "rope_scaling":
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not 0.0 <= self.attention_dropout <= 1.0:
            raise ValueError(f"attention_dropout must lie in [0, 1], got {self.attention_dropout}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {nearest(self.hidden_act, ACTIVATIONS)}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} lies outside of vocab_size {self.vocab_size}")

    @property
    def kv_heads(self) -> int:
        """``num_key_value_heads`` as the int that it is once the config is made."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """``head_dim`` as the int that it is once the config is made."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens back it sees (itself included); None: all."""
        return (None,) * self.num_hidden_layers

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rope in the spelling of transformers 5."""
        return {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a ``config.json``; see ``tt_models.config_from_hf``."""
        keys = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT and key != "model_type"}
        refuse_quantized(keys)
        keys |= cls.read_rope({key: keys.pop(key) for key in ROPE_KEYS if key in keys})
        for alias, name in cls.aliases.items():
            value = keys.pop(alias, None)
            if value is not None and keys.setdefault(name, value) != value:
                raise ValueError(f"config.json: {alias} = {value!r} contradicts {name} = {keys[name]!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {key: value for key, value in keys.items() if key in names}
        refuse_unknown({key: value for key, value in keys.items() if key not in names}, names | set(ROPE_KEYS))
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})  # type: ignore[arg-type]

    @classmethod
    def read_rope(cls, keys: Mapping[str, Any]) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling`` from either generation of config.json."""
        return split_rope_parameters(keys)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model; see ``tt_models.config_to_hf``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        for alias, name in self.aliases.items():
            plain[alias] = plain[name]
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        return head | plain | {"rope_parameters": self.rope_parameters}


def split_rope_parameters(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Flat ``rope_theta`` and ``rope_scaling`` out of the rope keys of a config.json, refusing contradictions."""
    flat = {key: keys[key] for key in ("rope_theta", "rope_scaling") if keys.get(key) is not None}
    parameters = dict(keys.get("rope_parameters") or {})
    if not parameters:
        return flat
    new: dict[str, Any] = {}
    if "rope_theta" in parameters:
        new["rope_theta"] = parameters.pop("rope_theta")
    scaling = check_rope_scaling(parameters)
    if scaling is not None:
        new["rope_scaling"] = scaling
    for key, value in flat.items():
        old = check_rope_scaling(value) if key == "rope_scaling" else value
        if old is not None and new.get(key, None if key == "rope_scaling" else old) != old:
            raise ValueError(
                f"config.json: {key} = {value!r} contradicts rope_parameters = {keys['rope_parameters']!r}"
            )
    return flat | new


def refuse_quantized(keys: Mapping[str, Any]) -> None:
    """Quantized repositories need another loader."""
    quantization = keys.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"config.json: quantization_config: {method}; only unquantized weights are read, take the original model"
        )


def refuse_unknown(keys: Mapping[str, Any], names: Collection[str]) -> None:
    """Every key that may change the maths must be known; null means that it is not set."""
    wrong = []
    for key, value in keys.items():
        if value is None:
            continue
        if key not in ONLY_VALUE:
            wrong.append(f"unknown key {nearest(key, names, known_as='nearest known key')} (value {value!r})")
        elif value not in ONLY_VALUE[key]:
            wrong.append(f"{key} = {value!r} is not supported, only {ONLY_VALUE[key][0]!r}")
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}; a key without effect on the logits may be removed")


def nearest(word: str, names: Collection[str], *, known_as: str = "did you mean") -> str:
    """``word`` quoted, with the closest of ``names`` or all of them."""
    close = difflib.get_close_matches(str(word), sorted(names), n=1, cutoff=0.6)
    return f"{word!r}: {known_as} {close[0]!r}" if close else f"{word!r}: known are {', '.join(sorted(names))}"
