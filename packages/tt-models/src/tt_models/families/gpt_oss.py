"""gpt-oss: https://arxiv.org/abs/2508.10925. Only unquantized weights are read; the published ones are MXFP4."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tt_models.config import LayeredConfig, check_experts
from tt_models.decoder import Decoder
from tt_models.llama import blocks_of, norm_of, rope_of
from tt_models.moe import grouped_linear, mix
from tt_models.norm import LateRoundingRMSNorm

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(LayeredConfig):
    """``config.json`` of a gpt-oss."""

    model_type: ClassVar[str] = "gpt_oss"
    architecture: ClassVar[str] = "GptOssForCausalLM"
    aliases: ClassVar[Mapping[str, str]] = {
        "experts_per_token": "num_experts_per_tok",
        "num_experts": "num_local_experts",
    }
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("use_attention_sinks", "attention_sink"), (True,)),
        **dict.fromkeys(("activation", "activation_function"), ("swiglu",)),
    }

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_scaling: Mapping[str, Any] | None = field(default_factory=lambda: dict(YARN))
    sliding_window: int | None = 128
    attention_bias: bool = True
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self, self.num_local_experts)


class BiasedExperts(nn.Module):
    """Experts with biases, laid out [X, in, out]; gate and up alternate, and both are clamped.

    ``y = down((up + 1) * gate * sigmoid(alpha * gate))``.
    """

    is_transposed = True  # for adapters: weights are [X, in, out], not [X, out, in]

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int, *, alpha: float, limit: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden_size, 2 * intermediate_size))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden_size))
        self.alpha, self.limit = alpha, limit

    def reset_parameters(self, std: float) -> None:
        """Normal weights, zero biases."""
        for weight, bias in ((self.gate_up_proj, self.gate_up_proj_bias), (self.down_proj, self.down_proj_bias)):
            nn.init.normal_(weight, std=std)
            nn.init.zeros_(bias)

    def forward(self, x_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts, [T, E]."""
        return mix(x_TE, weights_TK, experts_TK, self.gate_up_proj.shape[0], self.apply_experts)

    def apply_experts(self, x_RE: Tensor, counts_X: Tensor, experts_R: Tensor) -> Tensor:
        """Rows R sorted by expert, ``counts_X`` for each."""
        gate_up = grouped_linear(x_RE, self.gate_up_proj.transpose(1, 2), counts_X) + self.gate_up_proj_bias[experts_R]
        gate, up = gate_up[:, ::2].clamp(max=self.limit), gate_up[:, 1::2].clamp(-self.limit, self.limit)
        y_RI = (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        return grouped_linear(y_RI, self.down_proj.transpose(1, 2), counts_X) + self.down_proj_bias[experts_R]


class RoutedExperts(nn.Module):
    """A biased router: softmax over the scores of the chosen experts only."""

    def __init__(self, experts: BiasedExperts, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, num_experts)
        self.experts = experts
        self.top_k = top_k

    def forward(self, x_BSE: Tensor) -> Tensor:
        """[B, S, E] to the same shape."""
        x_TE = x_BSE.flatten(0, 1)
        scores_TK, experts_TK = self.router(x_TE).topk(self.top_k, dim=-1)
        return self.experts(x_TE, scores_TK.softmax(dim=-1), experts_TK).view(x_BSE.shape)  # type: ignore[no-any-return]


def gpt_oss(config: GptOssConfig) -> Decoder:
    """Attention with sinks and alternating windows, and experts in every layer."""
    rope, bias = rope_of(config), config.attention_bias
    size = (config.num_local_experts, config.hidden_size, config.intermediate_size)

    def experts(_: int) -> RoutedExperts:
        each = BiasedExperts(*size, alpha=config.swiglu_alpha, limit=config.swiglu_limit)
        return RoutedExperts(each, config.hidden_size, config.num_local_experts, config.num_experts_per_tok)

    attention: dict[str, Any] = {"rope": rope, "qkv_bias": bias, "output_bias": bias, "sinks": True}
    layers = blocks_of(config, experts, LateRoundingRMSNorm, **attention)
    return Decoder(config, layers, norm_of(config, LateRoundingRMSNorm))


SIZES: dict[str, GptOssConfig] = {
    "gpt_oss_20b": GptOssConfig(pad_token_id=199999, eos_token_id=200002, num_hidden_layers=24, num_local_experts=32),
}
