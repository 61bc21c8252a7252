"""Gemma 1, 2 and 3 (text): https://arxiv.org/abs/2403.08295, .../2408.00118, .../2503.19786."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from tt_models.attention import Attention, take
from tt_models.config import FULL, QK_NORM, SLIDING, LayeredConfig, ModelConfig, sized
from tt_models.config_keys import split_rope_parameters
from tt_models.decoder import Decoder
from tt_models.llama import attention_of, blocks_of, mlp_of, norm_of, rope_of, scaled_rope
from tt_models.norm import OffsetRMSNorm
from tt_models.shown import shown

TANH_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """``config.json`` of a Gemma 1."""

    model_type: ClassVar[str] = "gemma"
    architecture: ClassVar[str] = "GemmaForCausalLM"
    aliases: ClassVar[Mapping[str, str]] = {"hidden_activation": "hidden_act"}

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    hidden_act: str = TANH_GELU
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The first published files have ``gelu`` and mean its tanh approximation."""
        return super().from_hf({**config, "hidden_act": TANH_GELU} if config.get("hidden_act") == "gelu" else config)


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(LayeredConfig):
    """``config.json`` of a Gemma 2."""

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    written: ClassVar[Mapping[str, Any]] = {"use_bidirectional_attention": False}
    aliases: ClassVar[Mapping[str, str]] = {"hidden_activation": "hidden_act"}

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_act: str = TANH_GELU
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256  # scores are multiplied by this ** -0.5
    sliding_window: int | None = 4096
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The reference reads ``hidden_activation`` only; ``hidden_act`` has no effect."""
        act, config = config.get("hidden_act"), {key: config[key] for key in config if key != "hidden_act"}
        if act not in (None, "gelu", TANH_GELU) and config.get("hidden_activation") is None:
            raise ValueError(
                f"config.json: hidden_act = {shown(act)} is not what {cls.model_type} computes, which is "
                f"hidden_activation ({TANH_GELU!r} if it is not given): set hidden_activation, or remove hidden_act"
            )
        return super().from_hf(config)


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma2Config):
    """``config.json`` of a Gemma 3 text model; ``rope_scaling`` applies to the layers without a window."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = QK_NORM

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    rope_theta: float = 1e6
    rope_local_base_freq: float = 10000.0  # of the sliding layers
    sliding_window_pattern: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attn_logit_softcapping is not None:
            raise ValueError(f"attn_logit_softcapping must be null in Gemma 3, got {self.attn_logit_softcapping}")

    def usual_layer_types(self) -> tuple[str, ...]:
        """One layer in ``sliding_window_pattern`` sees everything."""
        layers, pattern = range(1, self.num_hidden_layers + 1), self.sliding_window_pattern
        return tuple(SLIDING if layer % pattern else FULL for layer in layers)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """By kind of layer."""
        local = {"rope_type": "default", "rope_theta": self.rope_local_base_freq}
        return {FULL: super().rope_parameters, SLIDING: local}

    @classmethod
    def read_rope(cls, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Both ropes from either generation of config.json."""
        nested = keys.get("rope_parameters") or {}
        if not isinstance(nested, Mapping) or nested.keys() - {FULL, SLIDING}:
            raise ValueError(f"config.json: rope_parameters must name {FULL} and {SLIDING}, got {shown(nested)}")
        found = split_rope_parameters({**keys, "rope_parameters": nested.get(FULL)})
        local = split_rope_parameters({"rope_parameters": nested.get(SLIDING)})
        if local.get("rope_scaling"):
            raise ValueError(f"config.json: rope_parameters of {SLIDING} must be of type 'default', got {shown(local)}")
        return found | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})


class SandwichBlock(nn.Module):
    """``x + norm(attention(norm x))``, then ``x + norm(mlp(norm x))``."""

    def __init__(self, self_attn: Attention, mlp: nn.Module, norms: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm, self.post_attention_layernorm = norms[:2]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2:]

    def forward(self, x_BSE: Tensor, *, rows: Tensor | None = None, **shared: Any) -> Tensor:
        """[B, S, E] to the same shape, or [1, N, E] for ``rows``; the keywords are those of ``Attention.forward``."""
        mixed = self.self_attn(self.input_layernorm(x_BSE), rows=rows, **shared)
        x_BSE = take(x_BSE, rows) + self.post_attention_layernorm(mixed)
        mixed = self.mlp(self.pre_feedforward_layernorm(x_BSE))
        return x_BSE + self.post_feedforward_layernorm(mixed)  # type: ignore[no-any-return]


def gemma(config: GemmaConfig) -> Decoder:
    """Llama's blocks with ``1 + w`` norms, scaled embeddings and a gelu."""
    rope, bias = rope_of(config), config.attention_bias
    numbers: dict[str, Any] = {"rope": rope, "qkv_bias": bias, "output_bias": bias}
    layers = blocks_of(config, lambda _: mlp_of(config), OffsetRMSNorm, **numbers)
    return Decoder(config, layers, norm_of(config, OffsetRMSNorm), embed_scale=config.hidden_size**0.5)


def gemma2(config: Gemma2Config) -> Decoder:
    """Four norms a block, alternating windows, bounded scores and logits."""
    rope = rope_of(config)
    return sandwich_decoder(config, {FULL: {"rope": rope}, SLIDING: {"rope": rope}})


def gemma3(config: Gemma3Config) -> Decoder:
    """Gemma 2 with normed queries and keys, and one rope for windows, another for the layers that see everything."""
    norm = partial(OffsetRMSNorm, eps=config.rms_norm_eps)
    local = {"rope": scaled_rope(config, config.rope_local_base_freq, None), "qk_norm": norm}
    return sandwich_decoder(config, {FULL: {"rope": rope_of(config), "qk_norm": norm}, SLIDING: local})


def sandwich_decoder(config: Gemma2Config, numbers: Mapping[str, Mapping[str, Any]]) -> Decoder:
    """What Gemma 2 and 3 share; ``numbers`` of the attention by kind of layer."""
    shared: dict[str, Any] = {
        **dict.fromkeys(("qkv_bias", "output_bias"), config.attention_bias),
        "scale": config.query_pre_attn_scalar**-0.5,
        "softcap": config.attn_logit_softcapping,
    }
    layers = [
        SandwichBlock(
            attention_of(config, layer, **shared, **numbers[kind]),
            mlp_of(config),
            tuple(norm_of(config, OffsetRMSNorm) for _ in range(4)),
        )
        for layer, kind in enumerate(config.layer_kinds)
    ]
    return Decoder(
        config,
        layers,
        norm_of(config, OffsetRMSNorm),
        embed_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
    )


GEMMA3 = Gemma3Config(sliding_window=1024, rope_scaling={"rope_type": "linear", "factor": 8.0})
SMALL = replace(GEMMA3, vocab_size=262144, max_position_embeddings=32768, sliding_window=512, rope_scaling=None)
SIZES_1: dict[str, GemmaConfig] = {
    "gemma_2b": sized(GemmaConfig(), 2048, 18, 8, 1, 16384, head_dim=256),
    "gemma_7b": sized(GemmaConfig(), 3072, 28, 16, 16, 24576, head_dim=256),
}
SIZES_2: dict[str, Gemma2Config] = {
    "gemma2_2b": sized(Gemma2Config(), 2304, 26, 8, 4, 9216, head_dim=256),
    "gemma2_9b": sized(Gemma2Config(), 3584, 42, 16, 8, 14336, head_dim=256),
    "gemma2_27b": sized(Gemma2Config(), 4608, 46, 32, 16, 36864, head_dim=128, query_pre_attn_scalar=144),
}
SIZES_3: dict[str, Gemma3Config] = {
    "gemma3_270m": sized(SMALL, 640, 18, 4, 1, 2048, head_dim=256),
    "gemma3_1b": sized(SMALL, 1152, 26, 4, 1, 6912, head_dim=256),
    "gemma3_4b": sized(GEMMA3, 2560, 34, 8, 4, 10240, head_dim=256),
    "gemma3_12b": sized(GEMMA3, 3840, 48, 16, 8, 15360, head_dim=256),
    "gemma3_27b": sized(GEMMA3, 5376, 62, 32, 16, 21504, head_dim=128, query_pre_attn_scalar=168),
}
