"""Phi 3, 3.5 and 4: https://arxiv.org/abs/2404.14219, https://arxiv.org/abs/2412.08905, under the name ``phi3``.

Queries, keys and values are one projection in the files and here, and so are gate and up of the mlp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tt_models.attention import Attention
from tt_models.config import ModelConfig, sized
from tt_models.config_keys import given_twice
from tt_models.cpu.elementwise import gated
from tt_models.cpu.products import linear
from tt_models.decoder import Decoder
from tt_models.llama import blocks_of, norm_of, rope_of
from tt_models.mlp import activation_named


@dataclass(frozen=True, kw_only=True)
class Phi3Config(ModelConfig):
    """``config.json`` of a Phi 3 or 4."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    written: ClassVar[Mapping[str, Any]] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096  # before longrope extended it
    partial_rotary_factor: float = 1.0  # the share of a head that is rotated
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    pad_token_id: int | None = 32000
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 32000

    @property
    def rotated_dim(self) -> int:
        """A share of a head."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """With the rotated share."""
        return super().rope_parameters | {"partial_rotary_factor": self.partial_rotary_factor}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The original length is outside the rope, and ``su`` or ``yarn`` mean longrope in older files."""
        config, shares = dict(config), {}
        for key in ("rope_scaling", "rope_parameters"):
            rope = config.get(key)
            if not isinstance(rope, Mapping):
                continue
            share = rope.get("partial_rotary_factor")
            if share is not None:
                if config.get("partial_rotary_factor", share) != share:
                    raise ValueError(given_twice("partial_rotary_factor", config["partial_rotary_factor"], share))
                shares["partial_rotary_factor"] = share
            kind = rope.get("rope_type") or rope.get("type") or "default"
            rope = {name: value for name, value in rope.items() if name not in ("type", "partial_rotary_factor")}
            if kind != "default":
                original = config.get("original_max_position_embeddings", cls.original_max_position_embeddings)
                rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
            config[key] = rope
        return super().from_hf(shares | config)


class FusedAttention(Attention):
    """One projection for queries, keys and values."""

    def add_projections(self, hidden_size: int, bias: bool) -> None:
        """Queries first, then keys, then values."""
        self.qkv_proj = nn.Linear(hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=bias)

    def project(self, x_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, S, heads, D] each."""
        q_k_v = linear(self.qkv_proj, x_BSE).view(*x_BSE.shape[:2], -1, self.head_dim)
        q, k, v = torch.split(q_k_v, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return q, k, v


class FusedMLP(nn.Module):
    """``y = down(act(gate x) * up x)``, gate and up being one projection."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = activation_named(activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape."""
        gate, up = linear(self.gate_up_proj, x).chunk(2, dim=-1)
        return linear(self.down_proj, gated(self.activation, gate, up))


def phi3(config: Phi3Config) -> Decoder:
    """Llama's blocks with fused projections, rotating a part of each head."""
    rope = rope_of(config, dim=config.rotated_dim)
    size = (config.hidden_size, config.intermediate_size)
    layers = blocks_of(config, lambda _: FusedMLP(*size, activation=config.hidden_act), kind=FusedAttention, rope=rope)
    return Decoder(config, layers, norm_of(config))


# https://huggingface.co/microsoft/Phi-4-mini-instruct: how much each of the 48 waves is slowed in a long context.
LONG_FACTOR = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
    32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
# https://huggingface.co/microsoft/Phi-3.5-mini-instruct: the same, and what it is in a short one.
LONG_FACTOR_3_5 = [
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
    1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
    4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945,
    24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523, 32.590003967285156,
    32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156, 50.45000457763672,
    57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457, 62.61000442504883, 62.62000274658203,
    62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094, 63.93000411987305, 63.96000289916992,
    63.970001220703125, 64.02999877929688, 64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938,
    64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062,
]  # fmt: skip
SHORT_FACTOR_3_5 = [
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, 1.0499999523162842, 1.0499999523162842,
    1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0699999332427979, 1.0999999046325684,
    1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662, 1.2899998426437378,
    1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083, 1.8499997854232788,
    1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745, 2.0199997425079346,
    2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346,
    2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914,
    2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0799996852874756,
    2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
    2.749999523162842, 2.8399994373321533,
]  # fmt: skip
PHI3 = Phi3Config(sliding_window=2047)
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
PHI3_5 = Phi3Config(
    max_position_embeddings=131072, sliding_window=262144,
    rope_scaling=LONGROPE | {"short_factor": SHORT_FACTOR_3_5, "long_factor": LONG_FACTOR_3_5},
)  # fmt: skip
PHI4 = Phi3Config(
    vocab_size=100352, max_position_embeddings=16384, original_max_position_embeddings=16384, rope_theta=250000.0,
    pad_token_id=100349, bos_token_id=100257, eos_token_id=100265,
)  # fmt: skip
PHI4_MINI = Phi3Config(
    vocab_size=200064, max_position_embeddings=131072, sliding_window=262144, partial_rotary_factor=0.75,
    rope_scaling=LONGROPE | {"short_factor": [1.0] * 48, "long_factor": LONG_FACTOR}, tie_word_embeddings=True,
    num_attention_heads=24, num_key_value_heads=8, pad_token_id=199999, bos_token_id=199999, eos_token_id=199999,
)  # fmt: skip
SIZES: dict[str, Phi3Config] = {
    "phi3_mini": sized(PHI3, 3072, 32, 32, 32, 8192),
    "phi3_medium": sized(PHI3, 5120, 40, 40, 10, 17920),
    "phi3_5_mini": sized(PHI3_5, 3072, 32, 32, 32, 8192),
    "phi4_14b": sized(PHI4, 5120, 40, 40, 10, 17920),
    "phi4_mini": sized(PHI4_MINI, 3072, 32, 24, 8, 8192),
}
