"""Qwen 2, 2.5, 3 and 3 mixture of experts: https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2505.09388."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import nn

from tt_models.config import FULL, QK_NORM, SLIDING, LayeredConfig, check_experts, sized
from tt_models.decoder import Block, Decoder
from tt_models.llama import blocks_of, mlp_of, norm_of, rope_of
from tt_models.moe import Experts, MixtureDecoder, MoE, softmax_then_top_k
from tt_models.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LayeredConfig):
    """``config.json`` of a Qwen 2 or 2.5."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("qkv_bias", "use_qkv_bias", "add_qkv_bias"), (True,)),
        "attention_bias": (True, False),  # the reference never reads it, its queries, keys and values are biased
    }

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28  # layers from this one on have the window, if it is used

    def usual_layer_types(self) -> tuple[str, ...]:
        """A window from ``max_window_layers`` on."""
        first = self.num_hidden_layers if self.window is None else self.max_window_layers
        return tuple(SLIDING if layer >= first else FULL for layer in range(self.num_hidden_layers))


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """``config.json`` of a Qwen 3."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = QK_NORM

    head_dim: int | None = 128
    attention_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """``config.json`` of a Qwen 3 mixture of experts."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1  # every n-th layer has experts
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self, self.num_experts)

    def usual_layer_types(self) -> tuple[str, ...]:
        """Every layer has the window, if it is used."""
        return (FULL if self.window is None else SLIDING,) * self.num_hidden_layers


def qwen2(config: Qwen2Config) -> Decoder:
    """Llama's blocks with biased queries, keys and values."""
    layers = blocks_of(config, lambda _: mlp_of(config), rope=rope_of(config), qkv_bias=True)
    return Decoder(config, layers, norm_of(config))


def qwen3_blocks(config: Qwen3Config, mlp: Callable[[int], nn.Module]) -> list[Block]:
    """Llama's blocks with normed queries and keys."""
    norm, bias = partial(RMSNorm, eps=config.rms_norm_eps), config.attention_bias
    return blocks_of(config, mlp, rope=rope_of(config), qkv_bias=bias, output_bias=bias, qk_norm=norm)


def qwen3(config: Qwen3Config) -> Decoder:
    """Normed queries and keys, no biases."""
    return Decoder(config, qwen3_blocks(config, lambda _: mlp_of(config)), norm_of(config))


def qwen3_moe(config: Qwen3MoeConfig) -> MixtureDecoder:
    """Qwen 3 with experts in most layers."""
    route = partial(softmax_then_top_k, top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob)
    size = (config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def mlp(layer: int) -> nn.Module:
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step:
            return mlp_of(config)
        return MoE(config.hidden_size, Experts(*size, activation=config.hidden_act), config.num_experts, route)

    return MixtureDecoder(config, qwen3_blocks(config, mlp), norm_of(config))


QWEN2 = Qwen2Config(
    max_position_embeddings=131072, rope_theta=1e6, sliding_window=131072, bos_token_id=151643, eos_token_id=151643
)
QWEN2_5 = replace(QWEN2, max_position_embeddings=32768, sliding_window=32768, tie_word_embeddings=True)
LARGE = {"vocab_size": 152064, "rms_norm_eps": 1e-5}
QWEN3 = Qwen3Config(
    max_position_embeddings=40960, rope_theta=1e6, sliding_window=None, bos_token_id=151643, eos_token_id=151645
)
TIED: dict[str, Any] = {"head_dim": 128, "tie_word_embeddings": True}
SIZES_2: dict[str, Qwen2Config] = {
    "qwen2_0_5b": sized(QWEN2, 896, 24, 14, 2, 4864, max_window_layers=24, tie_word_embeddings=True),
    "qwen2_1_5b": sized(QWEN2, 1536, 28, 12, 2, 8960, max_window_layers=28, tie_word_embeddings=True),
    "qwen2_7b": sized(QWEN2, 3584, 28, 28, 4, 18944, max_window_layers=28, vocab_size=152064),
    "qwen2_72b": sized(QWEN2, 8192, 80, 64, 8, 29568, max_window_layers=80, **LARGE),
    "qwen2_5_0_5b": sized(QWEN2_5, 896, 24, 14, 2, 4864, max_window_layers=24),
    "qwen2_5_1_5b": sized(QWEN2, 1536, 28, 12, 2, 8960, max_window_layers=28, tie_word_embeddings=True),
    "qwen2_5_3b": sized(QWEN2_5, 2048, 36, 16, 2, 11008, max_window_layers=36),
    "qwen2_5_7b": sized(QWEN2, 3584, 28, 28, 4, 18944, max_window_layers=28, vocab_size=152064),
    "qwen2_5_14b": sized(QWEN2, 5120, 48, 40, 8, 13824, max_window_layers=48, **LARGE),
    "qwen2_5_32b": sized(QWEN2, 5120, 64, 40, 8, 27648, max_window_layers=64, **LARGE),
    "qwen2_5_72b": sized(QWEN2, 8192, 80, 64, 8, 29568, max_window_layers=80, **LARGE),
}
SIZES_3: dict[str, Qwen3Config] = {
    "qwen3_0_6b": sized(QWEN3, 1024, 28, 16, 8, 3072, max_window_layers=28, **TIED),
    "qwen3_1_7b": sized(QWEN3, 2048, 28, 16, 8, 6144, max_window_layers=28, **TIED),
    "qwen3_4b": sized(QWEN3, 2560, 36, 32, 8, 9728, max_window_layers=36, **TIED),
    "qwen3_8b": sized(QWEN3, 4096, 36, 32, 8, 12288, max_window_layers=36),
    "qwen3_14b": sized(QWEN3, 5120, 40, 40, 8, 17408, max_window_layers=40),
    "qwen3_32b": sized(QWEN3, 5120, 64, 64, 8, 25600, max_window_layers=64, head_dim=128),
}
SIZES_3_MOE: dict[str, Qwen3MoeConfig] = {
    "qwen3_30b_a3b": Qwen3MoeConfig(
        num_hidden_layers=48, head_dim=128, max_window_layers=48, max_position_embeddings=40960, rope_theta=1e6,
        norm_topk_prob=True, sliding_window=None, bos_token_id=151643, eos_token_id=151645,
    ),
}  # fmt: skip
