"""OLMo 2: https://arxiv.org/abs/2501.00656."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from tt_models.attention import Attention, take
from tt_models.config import QK_NORM, ModelConfig, sized
from tt_models.cpu.products import linear
from tt_models.decoder import Decoder
from tt_models.llama import attention_of, mlp_of, norm_of, rope_of
from tt_models.norm import LateRoundingRMSNorm


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(ModelConfig):
    """``config.json`` of an OLMo 2."""

    model_type: ClassVar[str] = "olmo2"
    architecture: ClassVar[str] = "Olmo2ForCausalLM"
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = QK_NORM

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 50279


class Olmo2Attention(Attention):
    """Queries and keys are normed over all heads at once."""

    def __init__(self, *sizes: int, qk_norm: Callable[[int], nn.Module], **numbers: Any) -> None:
        super().__init__(*sizes, **numbers)
        self.q_norm = qk_norm(self.num_heads * self.head_dim)
        self.k_norm = qk_norm(self.num_kv_heads * self.head_dim)

    def project(self, x_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, S, heads, D] each."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        q, k, v = (linear(layer, x_BSE) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        shape = (*x_BSE.shape[:2], -1, self.head_dim)
        return q.view(shape), k.view(shape), v.view(shape)


class PostNormBlock(nn.Module):
    """``x + norm(attention x)``, then ``x + norm(mlp x)``."""

    def __init__(self, self_attn: Attention, mlp: nn.Module, attention_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.post_attention_layernorm = attention_norm
        self.post_feedforward_layernorm = mlp_norm

    def forward(self, x_BSE: Tensor, *, rows: Tensor | None = None, **shared: Any) -> Tensor:
        """[B, S, E] to the same shape, or [1, N, E] for ``rows``; the keywords are those of ``Attention.forward``."""
        x_BSE = take(x_BSE, rows) + self.post_attention_layernorm(self.self_attn(x_BSE, rows=rows, **shared))
        return x_BSE + self.post_feedforward_layernorm(self.mlp(x_BSE))  # type: ignore[no-any-return]


def olmo2(config: Olmo2Config) -> Decoder:
    """Norms after attention and mlp, none before them."""
    rope, bias = rope_of(config), config.attention_bias
    norm = partial(LateRoundingRMSNorm, eps=config.rms_norm_eps)
    numbers: dict[str, Any] = {"kind": Olmo2Attention, "rope": rope, "qkv_bias": bias, "output_bias": bias}
    layers = [
        PostNormBlock(
            attention_of(config, layer, qk_norm=norm, **numbers),
            mlp_of(config),
            norm_of(config, LateRoundingRMSNorm),
            norm_of(config, LateRoundingRMSNorm),
        )
        for layer in range(config.num_hidden_layers)
    ]
    return Decoder(config, layers, norm_of(config, LateRoundingRMSNorm))


PUBLISHED = Olmo2Config(
    vocab_size=100352, max_position_embeddings=4096, rope_theta=500000.0, rms_norm_eps=1e-6, pad_token_id=100277,
    eos_token_id=100257,
)  # fmt: skip
SIZES: dict[str, Olmo2Config] = {
    "olmo2_1b": sized(PUBLISHED, 2048, 16, 16, 16, 8192),
    "olmo2_7b": sized(PUBLISHED, 4096, 32, 32, 32, 11008),
    "olmo2_13b": sized(PUBLISHED, 5120, 40, 40, 40, 13824),
    "olmo2_32b": sized(PUBLISHED, 5120, 64, 40, 8, 27648),
}
