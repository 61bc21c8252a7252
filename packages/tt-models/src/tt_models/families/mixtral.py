"""Mixtral: https://arxiv.org/abs/2401.04088."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from tt_models.config import ModelConfig, check_experts
from tt_models.llama import blocks_of, norm_of, rope_of
from tt_models.moe import ExpertNames, Experts, MixtureDecoder, MoE, softmax_then_top_k


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(ModelConfig):
    """``config.json`` of a Mixtral."""

    model_type: ClassVar[str] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    written: ClassVar[Mapping[str, Any]] = {"router_jitter_noise": 0.0}
    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self, self.num_local_experts)


class MixtralDecoder(MixtureDecoder):
    """With the names of Mixtral's files."""

    names: ClassVar[ExpertNames] = ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def mixtral(config: MixtralConfig) -> MixtralDecoder:
    """Mistral with experts in every layer."""
    route = partial(softmax_then_top_k, top_k=config.num_experts_per_tok, renormalize=True)
    size = (config.num_local_experts, config.hidden_size, config.intermediate_size)

    def mlp(_: int) -> MoE:
        return MoE(config.hidden_size, Experts(*size, activation=config.hidden_act), config.num_local_experts, route)

    layers = blocks_of(config, mlp, rope=rope_of(config))
    return MixtralDecoder(config, layers, norm_of(config))


SIZES = {"mixtral_8x7b": MixtralConfig(max_position_embeddings=32768, router_aux_loss_coef=0.02)}
