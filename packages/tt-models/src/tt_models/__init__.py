"""Decoder-only language models in plain PyTorch: one file per family, KV cache, generation."""

from collections.abc import Callable
from functools import partial

from tt_models.attention import Attention
from tt_models.auto import build, config_from_hf, config_to_hf, get_config, list_models
from tt_models.config import ModelConfig
from tt_models.decoder import Block, Decoder
from tt_models.families.gemma import Gemma2Config, Gemma3Config, GemmaConfig
from tt_models.families.gpt_oss import GptOssConfig
from tt_models.families.mistral import MistralConfig
from tt_models.families.mixtral import MixtralConfig
from tt_models.families.olmo2 import Olmo2Config
from tt_models.families.phi import Phi3Config
from tt_models.families.qwen import Qwen2Config, Qwen3Config, Qwen3MoeConfig
from tt_models.families.smollm3 import SmolLM3Config
from tt_models.generate import generate, stream
from tt_models.kv_cache import KVCache
from tt_models.llama import LlamaConfig, llama_mlp_width
from tt_models.mlp import MLP
from tt_models.moe import Experts, MoE, load_balancing_loss, record_router_logits
from tt_models.norm import RMSNorm
from tt_models.parity import verify
from tt_models.rope import Rope

__version__ = "0.1.0"

__all__ = [
    "build",
    "get_config",
    "list_models",
    "config_from_hf",
    "config_to_hf",
    "generate",
    "stream",
    "KVCache",
    "ModelConfig",
    "Decoder",
    "record_router_logits",
    "load_balancing_loss",
    "verify",
    # the blocks, and the configurations of the families
    "Attention",
    "MLP",
    "RMSNorm",
    "Rope",
    "Block",
    "Experts",
    "MoE",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "GemmaConfig",
    "Gemma2Config",
    "Gemma3Config",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "Phi3Config",
    "Olmo2Config",
    "SmolLM3Config",
    "GptOssConfig",
    "llama_mlp_width",
]


def __getattr__(name: str) -> Callable[..., Decoder]:
    """``tt_models.llama2_7b(device=None, dtype=None)`` is ``tt_models.build("llama2_7b", ...)``, for every name."""
    if name not in list_models():
        raise AttributeError(f"module 'tt_models' has no attribute {name!r}")
    return partial(build, name)


def __dir__() -> list[str]:
    return [*__all__, *list_models()]
