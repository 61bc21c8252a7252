"""Decoder-only language models in plain PyTorch: one file per family, KV cache, generation."""

from typing import TYPE_CHECKING

from tt_models.attention import Attention
from tt_models.auto import Builder, build, builder, config_from_hf, config_to_hf, get_config, list_models
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
from tt_models.generate import generate, stream, stream_rows
from tt_models.kv_cache import KVCache
from tt_models.llama import LlamaConfig, llama_mlp_width
from tt_models.mlp import MLP
from tt_models.moe import Experts, MoE, load_balancing_loss, record_router_logits
from tt_models.norm import RMSNorm
from tt_models.parity import verify
from tt_models.rope import Rope
from tt_models.sampling import row_seed

__version__ = "0.1.0"

__all__ = [
    "build", "get_config", "list_models", "config_from_hf", "config_to_hf", "generate", "stream", "stream_rows",
    "row_seed", "KVCache", "ModelConfig", "Decoder", "record_router_logits", "load_balancing_loss", "verify",
    # the blocks, and the configurations of the families
    "Attention", "MLP", "RMSNorm", "Rope", "Block", "Experts", "MoE", "LlamaConfig", "MistralConfig", "MixtralConfig",
    "GemmaConfig", "Gemma2Config", "Gemma3Config", "Qwen2Config", "Qwen3Config", "Qwen3MoeConfig", "Phi3Config",
    "Olmo2Config", "SmolLM3Config", "GptOssConfig", "llama_mlp_width",
]  # fmt: skip

if TYPE_CHECKING:  # so that a type checker knows each name of list_models(), and reports a misspelt one
    llama2_7b = llama2_13b = llama2_70b = code_llama_7b = code_llama_13b = code_llama_34b = builder("")
    code_llama_70b = llama3_8b = llama3_70b = llama3_1_8b = llama3_1_70b = llama3_2_1b = llama3_2_3b = builder("")
    llama3_3_70b = smollm2_135m = smollm2_360m = smollm2_1_7b = builder("")
    mistral_7b = mistral_7b_v0_2 = mistral_7b_v0_3 = mistral_nemo_12b = mistral_small_24b = builder("")
    mixtral_8x7b = builder("")
    gemma_2b = gemma_7b = builder("")
    gemma2_2b = gemma2_9b = gemma2_27b = builder("")
    gemma3_270m = gemma3_1b = gemma3_4b = gemma3_12b = gemma3_27b = builder("")
    qwen2_0_5b = qwen2_1_5b = qwen2_7b = qwen2_72b = qwen2_5_0_5b = qwen2_5_1_5b = qwen2_5_3b = builder("")
    qwen2_5_7b = qwen2_5_14b = qwen2_5_32b = qwen2_5_72b = builder("")
    qwen3_0_6b = qwen3_1_7b = qwen3_4b = qwen3_8b = qwen3_14b = qwen3_32b = builder("")
    qwen3_30b_a3b = builder("")
    phi3_mini = phi3_medium = phi3_5_mini = phi4_14b = phi4_mini = builder("")
    olmo2_1b = olmo2_7b = olmo2_13b = olmo2_32b = builder("")
    smollm3_3b = builder("")
    gpt_oss_20b = builder("")
else:

    def __getattr__(name: str) -> Builder:
        """``tt_models.llama2_7b(device=None, dtype=None)`` is ``tt_models.build("llama2_7b", ...)``, for every name."""
        if name not in list_models():
            raise AttributeError(f"module 'tt_models' has no attribute {name!r}")
        return builder(name)


def __dir__() -> list[str]:
    return [*__all__, *list_models()]
