"""Mistral 7B v0.1 to v0.3, Nemo, Small: https://arxiv.org/abs/2310.06825."""

from dataclasses import dataclass, replace
from typing import ClassVar

from tt_models.config import ModelConfig
from tt_models.decoder import Decoder
from tt_models.llama import blocks_of, mlp_of, norm_of, rope_of


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


def mistral(config: MistralConfig) -> Decoder:
    """Pre-norm blocks with grouped queries and a sliding window."""
    return Decoder(config, blocks_of(config, lambda _: mlp_of(config), rope=rope_of(config)), norm_of(config))


V1 = MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096)
V3 = replace(V1, vocab_size=32768, sliding_window=None, rope_theta=1e6)
# its head_dim stays 128
NEMO = replace(V3, vocab_size=131072, hidden_size=5120, num_hidden_layers=40, max_position_embeddings=131072)
SMALL = replace(NEMO, intermediate_size=32768, max_position_embeddings=32768, rope_theta=1e8)

SIZES: dict[str, MistralConfig] = {
    "mistral_7b": V1,
    "mistral_7b_v0_2": replace(V1, sliding_window=None, rope_theta=1e6),
    "mistral_7b_v0_3": V3,
    "mistral_nemo_12b": NEMO,
    "mistral_small_24b": SMALL,
}
