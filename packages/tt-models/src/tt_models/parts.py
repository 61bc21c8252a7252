"""The usual parts of a decoder, made from the config fields that all families share."""

from collections.abc import Mapping
from typing import Any

from tt_models.attention import Attention
from tt_models.config import ModelConfig
from tt_models.mlp import MLP
from tt_models.norm import RMSNorm
from tt_models.rope import Rope


def rope_of(config: ModelConfig, *, dim: int | None = None) -> Rope:
    """Rotary positions over the whole head, or over its first ``dim`` elements."""
    return scaled_rope(config, config.rope_theta, config.rope_scaling, dim=dim)


def scaled_rope(
    config: ModelConfig, theta: float, scaling: Mapping[str, Any] | None, *, dim: int | None = None
) -> Rope:
    """The same with another base and scaling than the config's own."""
    longest = config.max_position_embeddings
    return Rope(dim or config.head_size, theta=theta, scaling=scaling, max_position_embeddings=longest)


def attention_of(config: ModelConfig, layer: int, *, kind: type[Attention] = Attention, **numbers: Any) -> Attention:
    """The attention of one layer, with its window; ``numbers`` are the family's own."""
    return kind(
        config.hidden_size,
        config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        window=config.layer_windows[layer],
        dropout=config.attention_dropout,
        **numbers,
    )


def mlp_of(config: ModelConfig, *, bias: bool = False) -> MLP:
    """The gated feed-forward block."""
    return MLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act, bias=bias)


def norm_of(config: ModelConfig, kind: type[RMSNorm] = RMSNorm) -> RMSNorm:
    """A norm over the hidden size."""
    return kind(config.hidden_size, eps=config.rms_norm_eps)
