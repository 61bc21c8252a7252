"""The table of families, and the functions that use it: from a name or a ``config.json`` to a decoder."""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from tt_models import llama
from tt_models.config import ModelConfig
from tt_models.config_keys import nearest
from tt_models.cpu.blocks import keep_freed_memory
from tt_models.decoder import Decoder, init_weights_
from tt_models.families import gemma, gpt_oss, mistral, mixtral, olmo2, phi, qwen, smollm3
from tt_models.limits import LONGEST_KEY, MOST_KEYS, refuse_too_large, weight_bytes
from tt_models.shown import shown

CURE = re.compile(r"\b(use|set|remove|choose|write|did you mean)\b")  # a message that contains a cure


class Family(NamedTuple):
    """A config class, the function that builds a decoder from it, and the published sizes."""

    config: type[ModelConfig]
    decoder: Callable[[Any], Decoder]
    sizes: Mapping[str, ModelConfig]


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.LlamaConfig, llama.llama, llama.SIZES),
    "mistral": Family(mistral.MistralConfig, mistral.mistral, mistral.SIZES),
    "mixtral": Family(mixtral.MixtralConfig, mixtral.mixtral, mixtral.SIZES),
    "gemma": Family(gemma.GemmaConfig, gemma.gemma, gemma.SIZES_1),
    "gemma2": Family(gemma.Gemma2Config, gemma.gemma2, gemma.SIZES_2),
    "gemma3_text": Family(gemma.Gemma3Config, gemma.gemma3, gemma.SIZES_3),
    "qwen2": Family(qwen.Qwen2Config, qwen.qwen2, qwen.SIZES_2),
    "qwen3": Family(qwen.Qwen3Config, qwen.qwen3, qwen.SIZES_3),
    "qwen3_moe": Family(qwen.Qwen3MoeConfig, qwen.qwen3_moe, qwen.SIZES_3_MOE),
    "phi3": Family(phi.Phi3Config, phi.phi3, phi.SIZES),
    "olmo2": Family(olmo2.Olmo2Config, olmo2.olmo2, olmo2.SIZES),
    "smollm3": Family(smollm3.SmolLM3Config, smollm3.smollm3, smollm3.SIZES),
    "gpt_oss": Family(gpt_oss.GptOssConfig, gpt_oss.gpt_oss, gpt_oss.SIZES),
}


def list_models() -> list[str]:
    """The names that ``build`` and ``get_config`` accept, family by family."""
    return [name for family in FAMILIES.values() for name in family.sizes]


def get_config(name: str) -> ModelConfig:
    """The published configuration of a named size, such as ``llama3_2_1b``."""
    for family in FAMILIES.values():
        if isinstance(name, str) and name in family.sizes:
            return family.sizes[name]
    close = difflib.get_close_matches(str(name)[:LONGEST_KEY], list_models(), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "see tt_models.list_models()"
    raise ValueError(f"no model is named {shown(name)}: {hint}")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a ``config.json`` of either generation (``rope_theta`` or ``rope_parameters``).

    Defaults are those of the reference. ValueError for an unknown ``model_type``, rope type, or key that may change the
    maths.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json must be a mapping, got {type(config).__name__}")
    odd = next((key for key in config if not isinstance(key, str) or len(key) > LONGEST_KEY), None)
    if odd is not None or len(config) > MOST_KEYS:
        what = f"{len(config):,} keys" if odd is None else f"the key {shown(odd)}"
        expected = f"at most {MOST_KEYS:,} keys of up to {LONGEST_KEY} characters"
        raise ValueError(f"config.json has {what}, expected {expected}; use the model's own")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"config.json has no model_type but {shown(model_type)}; supported are {', '.join(FAMILIES)}")
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if model_type not in FAMILIES and isinstance(inner, str) and inner in FAMILIES:
        raise ValueError(
            f"config.json: model_type {shown(model_type)} is not text only; only its text_config ({inner!r}) can be "
            "read: use a text-only model"
        )
    if model_type not in FAMILIES:
        other = f"architectures {shown(config['architectures'])}; " if config.get("architectures") else ""
        close = nearest(model_type, FAMILIES).partition("known are ")[0]
        raise ValueError(f"config.json: model_type {close.rstrip()} {other}supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[model_type].config.from_hf(config)
    except ValueError as error:
        text = str(error).removeprefix("config.json: ")
        cure = "" if CURE.search(text) else "; correct it, or use the model's own config.json"
        raise ValueError(f"config.json: {text}{cure}") from None


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` that transformers reads; rope is written in both generations' spelling."""
    if not isinstance(config, ModelConfig):
        raise ValueError(f"config_to_hf takes a config from config_from_hf, not {type(config).__name__}")
    return config.to_hf()


def build(
    name_or_config: str | ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Decoder:
    """A decoder with random weights from torch's global generator (standard deviation ``initializer_range``).

    On ``device="meta"`` it has shapes only; materialize its parameters to use it (there are no buffers).
    """
    keep_freed_memory()
    config = get_config(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if not isinstance(config, ModelConfig) or config.model_type not in FAMILIES:
        raise ValueError(f"build takes a name, or a config from config_from_hf, not {type(config).__name__}")
    try:
        device = torch.get_default_device() if device is None else torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a name such as 'cpu', 'cuda' or 'meta', got {shown(device)}") from None
    with torch.device("meta"):
        model = FAMILIES[config.model_type].decoder(config).to(dtype or torch.get_default_dtype())
    if device.type != "meta":
        count, kind = sum(p.numel() for p in model.parameters()), str(next(model.parameters()).dtype)
        what = f"a {config.model_type} of {count:,} parameters as {kind.removeprefix('torch.')}"
        cure = "use a smaller model, dtype=torch.bfloat16, or device='meta'"
        refuse_too_large(what, weight_bytes(model), device, cure)
        model.to_empty(device=device)
        init_weights_(model, config.initializer_range)
    return model


class Builder(Protocol):
    """``tt_models.llama3_2_1b`` and every other name of ``list_models``."""

    def __call__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Decoder:
        """``build`` with the name given."""
        ...


@functools.cache
def builder(name: str) -> Builder:
    """The function that builds a named size; its docstring contains the shape and the source."""

    def build_named(*, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Decoder:
        return build(name, device=device, dtype=dtype)

    config = get_config(name)
    source = (sys.modules[type(config).__module__].__doc__ or "").partition("\n")[0]  # the models, and their papers
    build_named.__name__ = build_named.__qualname__ = name
    build_named.__module__ = "tt_models"  # pickle looks for it there
    build_named.__doc__ = (
        f"""A {config.model_type} decoder of the published size ``{name}``, with random weights; see ``build``.

{config.num_hidden_layers} layers, hidden_size {config.hidden_size:,}, {config.num_attention_heads} heads of """
        f"""{config.head_size} ({config.kv_heads} for keys and values), intermediate_size {config.intermediate_size:,},
vocab_size {config.vocab_size:,}, {config.max_position_embeddings:,} positions.

{source}"""
    )
    return build_named
