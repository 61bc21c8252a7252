"""Llama 2, 3 to 3.3, Code Llama, SmolLM 1 and 2: https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783.

The plain decoder, which the ``families`` vary: they use its parts (``blocks_of``, ``attention_of``,
``mlp_of``, ``norm_of``, ``rope_of``) and change what differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import nn

from tt_models.attention import Attention
from tt_models.config import ModelConfig, sized
from tt_models.decoder import Block, Decoder
from tt_models.mlp import MLP
from tt_models.norm import RMSNorm
from tt_models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """``config.json`` of a Llama."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    attention_bias: bool = False  # of all four projections
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


def llama(config: LlamaConfig) -> Decoder:
    """Pre-norm blocks with rotary positions and a gated mlp."""
    rope, bias = rope_of(config), config.attention_bias
    mlp = partial(mlp_of, config, bias=config.mlp_bias)
    layers = blocks_of(config, lambda _: mlp(), rope=rope, qkv_bias=bias, output_bias=bias)
    return Decoder(config, layers, norm_of(config))


def blocks_of(
    config: ModelConfig, mlp: Callable[[int], nn.Module], norm: type[RMSNorm] = RMSNorm, **numbers: Any
) -> list[Block]:
    """A pre-norm block for each layer; ``mlp`` makes the second half of a layer, ``numbers`` are of the attention."""
    return [
        Block(attention_of(config, layer, **numbers), mlp(layer), norm_of(config, norm), norm_of(config, norm))
        for layer in range(config.num_hidden_layers)
    ]


def rope_of(config: ModelConfig, *, dim: int | None = None) -> Rope:
    """Rotary positions over the whole head, or over its first ``dim`` elements."""
    return scaled_rope(config, config.rope_theta, config.rope_scaling, dim=dim)


def scaled_rope(config: ModelConfig, theta: float, scaling: Mapping[str, Any] | None, dim: int | None = None) -> Rope:
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


def llama_mlp_width(hidden_size: int, *, multiple_of: int = 256) -> int:
    """The ``intermediate_size`` of Llama 2: two thirds of four times the hidden size, rounded up."""
    return -(-(8 * hidden_size // 3) // multiple_of) * multiple_of


LLAMA2 = LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5)
CODE_LLAMA = replace(LLAMA2, vocab_size=32016, max_position_embeddings=16384, rope_theta=1e6)
LLAMA3 = LlamaConfig(
    vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000,
    eos_token_id=128001,
)  # fmt: skip
LONG = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA3_1 = replace(LLAMA3, max_position_embeddings=131072, rope_scaling=LONG | {"factor": 8.0})
LLAMA3_2 = replace(LLAMA3_1, rope_scaling=LONG | {"factor": 32.0}, tie_word_embeddings=True)
SMOLLM2 = LlamaConfig(
    vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
    initializer_range=0.041666666666666664, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip

SIZES: dict[str, LlamaConfig] = {
    "llama2_7b": sized(LLAMA2, 4096, 32, 32, 32, 11008),
    "llama2_13b": sized(LLAMA2, 5120, 40, 40, 40, 13824),
    "llama2_70b": sized(LLAMA2, 8192, 80, 64, 8, 28672),
    "code_llama_7b": sized(CODE_LLAMA, 4096, 32, 32, 32, 11008),
    "code_llama_13b": sized(CODE_LLAMA, 5120, 40, 40, 40, 13824),
    "code_llama_34b": sized(replace(CODE_LLAMA, vocab_size=32000), 8192, 48, 64, 8, 22016),
    "code_llama_70b": sized(CODE_LLAMA, 8192, 80, 64, 8, 28672),
    "llama3_8b": sized(LLAMA3, 4096, 32, 32, 8, 14336),
    "llama3_70b": sized(LLAMA3, 8192, 80, 64, 8, 28672),
    "llama3_1_8b": sized(LLAMA3_1, 4096, 32, 32, 8, 14336),
    "llama3_1_70b": sized(LLAMA3_1, 8192, 80, 64, 8, 28672),
    "llama3_2_1b": sized(LLAMA3_2, 2048, 16, 32, 8, 8192),
    "llama3_2_3b": sized(LLAMA3_2, 3072, 28, 24, 8, 8192),
    "llama3_3_70b": sized(replace(LLAMA3_1, eos_token_id=(128001, 128008, 128009)), 8192, 80, 64, 8, 28672),
    "smollm2_135m": sized(SMOLLM2, 576, 30, 9, 3, 1536),
    "smollm2_360m": sized(SMOLLM2, 960, 32, 15, 5, 2560),
    "smollm2_1_7b": sized(replace(SMOLLM2, rope_theta=130000.0, initializer_range=0.02), 2048, 24, 32, 32, 8192),
}
