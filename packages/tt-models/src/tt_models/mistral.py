"""Mistral: https://arxiv.org/abs/2310.06825."""

from dataclasses import dataclass
from typing import ClassVar

from tt_models.attention import Attention
from tt_models.config import ModelConfig
from tt_models.decoder import Block, Decoder
from tt_models.mlp import MLP
from tt_models.norm import RMSNorm
from tt_models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class MistralConfig(ModelConfig):
    """``config.json`` of a Mistral."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # tokens that each layer sees back, itself included
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The same window in every layer."""
        return (self.sliding_window,) * self.num_hidden_layers


def mistral(config: MistralConfig) -> Decoder:
    """Pre-norm blocks with grouped queries and a sliding window."""
    rope = Rope(
        config.head_size,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        max_position_embeddings=config.max_position_embeddings,
    )
    layers = [
        Block(
            Attention(
                config.hidden_size,
                config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                rope=rope,
                window=config.sliding_window,
                dropout=config.attention_dropout,
            ),
            MLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act),
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        )
        for _ in range(config.num_hidden_layers)
    ]
    return Decoder(config, layers, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))


SIZES: dict[str, MistralConfig] = {
    "mistral_7b": MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096),
}
