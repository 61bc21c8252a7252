"""Llama 2, 3, 3.1, 3.2, 3.3 and Code Llama: https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783."""

from dataclasses import dataclass
from typing import ClassVar

from tt_models.attention import Attention
from tt_models.config import ModelConfig
from tt_models.decoder import Block, Decoder
from tt_models.mlp import MLP
from tt_models.norm import RMSNorm
from tt_models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """``config.json`` of a Llama."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


def llama(config: LlamaConfig) -> Decoder:
    """Pre-norm blocks with rotary positions and a gated mlp."""
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
                qkv_bias=config.attention_bias,
                output_bias=config.attention_bias,
                rope=rope,
                dropout=config.attention_dropout,
            ),
            MLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act, bias=config.mlp_bias),
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        )
        for _ in range(config.num_hidden_layers)
    ]
    return Decoder(config, layers, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))


def llama2(
    hidden_size: int, layers: int, heads: int, intermediate_size: int, kv_heads: int | None = None
) -> LlamaConfig:
    """A size of Llama 2."""
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def llama3(
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    *,
    scaling_factor: float | None = None,
    tied: bool = False,
) -> LlamaConfig:
    """A size of Llama 3, or of 3.1 and later where a ``scaling_factor`` extends the context."""
    scaling = {
        "rope_type": "llama3",
        "factor": scaling_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072 if scaling_factor else 8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaling if scaling_factor else None,
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_id=128001,
    )


SIZES: dict[str, LlamaConfig] = {
    "llama2_7b": llama2(4096, 32, 32, 11008),
    "llama2_13b": llama2(5120, 40, 40, 13824),
    "llama2_70b": llama2(8192, 80, 64, 28672, kv_heads=8),
    "llama3_8b": llama3(4096, 32, 32, 14336),
    "llama3_70b": llama3(8192, 80, 64, 28672),
    "llama3_1_8b": llama3(4096, 32, 32, 14336, scaling_factor=8.0),
    "llama3_1_70b": llama3(8192, 80, 64, 28672, scaling_factor=8.0),
    "llama3_2_1b": llama3(2048, 16, 32, 8192, scaling_factor=32.0, tied=True),
    "llama3_2_3b": llama3(3072, 28, 24, 8192, scaling_factor=32.0, tied=True),
    "llama3_3_70b": llama3(8192, 80, 64, 28672, scaling_factor=8.0),
}
