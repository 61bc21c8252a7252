"""Decoder-only language models in plain PyTorch: one file per family, KV cache, generation."""

from collections.abc import Callable
from functools import partial

from tt_models.auto import build, config_from_hf, config_to_hf, get_config, list_models
from tt_models.config import ModelConfig
from tt_models.decoder import Decoder
from tt_models.generate import generate, stream
from tt_models.kv_cache import KVCache
from tt_models.moe import load_balancing_loss, record_router_logits
from tt_models.parity import verify

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
]


def __getattr__(name: str) -> Callable[..., Decoder]:
    """``tt_models.llama2_7b(device=None, dtype=None)`` is ``tt_models.build("llama2_7b", ...)``, for every name."""
    if name not in list_models():
        raise AttributeError(f"module 'tt_models' has no attribute {name!r}")
    return partial(build, name)


def __dir__() -> list[str]:
    return [*__all__, *list_models()]
