"""The key-value pairs of a GGUF file from a config: the inverse of ``config.py``, by which every setting is checked.

The names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What no key expresses is refused by name.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_ckpt.formats.gguf.config import config_of
from tt_ckpt.formats.gguf.file import GGUF, GGUFTensor
from tt_ckpt.formats.gguf.names import architecture_for
from tt_ckpt.formats.translation import number, positive
from tt_ckpt.shown import quoted

# settings of training and of programs, and ids that the tokenizer's keys give; rope is compared apart
_NO_EFFECT = (
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "embd_pdrop", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits", "pretraining_tp", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id",
    "rope_parameters", "rope_scaling", "rope_theta",
)  # fmt: skip
_NEUTRAL: tuple[object, ...] = (None, False, 1.0, [], {})  # of a setting that the reader does not give back
_WINDOW_IGNORED = ("mistral", "mixtral", "phi3")  # by llama.cpp, whose graphs of these have full attention only
_CLOSE = 1e-6  # numbers are stored in float32


def values_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The keys of the architecture. ``config``: complete, as ``tt_models.config_to_hf`` writes it; ``shapes``: of the
    tensors under their GGUF names.

    Raises:
        ValueError: naming every setting that GGUF, or llama.cpp's graph of this architecture, cannot express.
    """
    kind = str(config.get("model_type"))
    name = architecture_for(kind)
    heads = positive(config, "num_attention_heads")
    head_dim = positive(config, "head_dim", default=positive(config, "hidden_size") // heads)
    found: dict[str, Any] = {
        "block_count": positive(config, "num_hidden_layers"),
        "context_length": positive(config, "max_position_embeddings"),
        "embedding_length": positive(config, "hidden_size"),
        "feed_forward_length": positive(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": positive(config, "num_key_value_heads", default=heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": number(config, "rms_norm_eps"),
        "rope.freq_base": number(config, "rope_theta"),
        "rope.dimension_count": round(head_dim * number(config, "partial_rotary_factor", default=1.0)),
        "vocab_size": shapes["token_embd.weight"][0],
    }
    found |= dict(_family(config, kind)) | _rope(config)
    values = {"general.architecture": name, **{f"{name}.{key}": value for key, value in found.items()}}
    _refuse_unsaid(config, values, shapes)
    return values


def _family(config: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    window = config.get("sliding_window")
    if window and kind in (*_WINDOW_IGNORED, "gemma2", "gemma3_text"):
        yield "attention.sliding_window", positive(config, "sliding_window")
    elif kind == "phi3":
        yield "attention.sliding_window", 0
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            yield key, number(config, key)
    if kind == "gemma3_text":
        yield "rope.freq_base_swa", number(config, "rope_local_base_freq")
    if kind in ("mixtral", "qwen3_moe"):
        yield "expert_count", positive(config, "num_local_experts" if kind == "mixtral" else "num_experts")
        yield "expert_used_count", positive(config, "num_experts_per_tok")
    if kind == "qwen3_moe":
        yield "expert_feed_forward_length", positive(config, "moe_intermediate_size")


def attention_note(config: Mapping[str, Any]) -> list[str]:
    """A sentence if llama.cpp attends to more than the model does."""
    window, kind = config.get("sliding_window"), config.get("model_type")
    if kind not in _WINDOW_IGNORED or not window or window >= config["max_position_embeddings"]:
        return []
    return [f"llama.cpp has no sliding window for {kind}: beyond {window} tokens it attends to all, the model does not"]


# ---- rope ------------------------------------------------------------------------------------------------------------


def _scaling(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type of the rope scaling (``default`` if there is none) and its settings."""
    given = dict(config.get("rope_scaling") or {})
    old = given.pop("type", None)
    return str(given.pop("rope_type", old) or "default"), given


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    kind, given = _scaling(config)
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": number(given, "factor")}
    if kind == "yarn":
        original = positive(given, "original_max_position_embeddings")
        found = {"rope.scaling.type": "yarn", "rope.scaling.factor": number(given, "factor")}
        found |= {"rope.scaling.original_context_length": original}
        betas = [key for key in ("beta_fast", "beta_slow") if given.get(key) is not None]
        return found | {f"rope.scaling.yarn_{key}": number(given, key) for key in betas}
    if kind == "longrope":
        original = positive(config, "original_max_position_embeddings")
        ratio = positive(config, "max_position_embeddings") / original
        derived = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        factor = number(given, "attention_factor", default=derived)
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
    return {}


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What llama.cpp divides the rotary frequencies by, in float32 under its GGUF names; {} if nothing."""
    kind, given = _scaling(config)
    if kind == "longrope":
        names = {f"rope_factors_{size}.weight": given.get(f"{size}_factor") for size in ("long", "short")}
        return {name: torch.tensor(factors, dtype=torch.float32) for name, factors in names.items()}
    if kind != "llama3":
        return {}
    factor, low, high = (number(given, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = _frequencies(config) * positive(given, "original_max_position_embeddings") / (2 * torch.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a frequency is kept, 0: it is divided by factor
    return {"rope_freqs.weight": (1 / ((1 - share) / factor + share)).float()}


def _frequencies(config: Mapping[str, Any]) -> Tensor:
    dim = positive(config, "head_dim")
    return number(config, "rope_theta") ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


# ---- what GGUF does not express --------------------------------------------------------------------------------------


def _refuse_unsaid(config: Mapping[str, Any], values: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the reader makes the same config of these keys and tensors."""
    where = Path("config.json")
    tensors = {
        name: GGUFTensor(file=where, start=0, kind="F32", shape=shape, row_bytes=0)
        for name, shape in shapes.items() if not name.startswith("rope_")
    }  # fmt: skip
    kept = {key: value for key, value in values.items() if not key.endswith(".attn_factor")}  # goes with the factors
    again = config_of(GGUF(path=where, values=kept, tensors=tensors), _read_as(config))
    problems = [*_differences(config, again), *_rope_differences(config, again)]
    if problems:
        raise ValueError(
            f"config.json: {', '.join(problems)} cannot be expressed in GGUF: llama.cpp would compute something else; "
            "export with --to hf"
        )


def _read_as(config: Mapping[str, Any]) -> str:
    return "llama" if config["model_type"] == "mistral" else str(config["model_type"])


def _differences(config: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    """The settings of ``config`` that ``again`` has with another value, or lacks although they have an effect."""
    unused = {"sliding_window", "max_window_layers"} if config.get("use_sliding_window") is False else set()
    unused |= {"num_experts", "num_local_experts"} - again.keys()  # two names of one number, which values_of wants
    unused |= {"original_max_position_embeddings"} if _scaling(config)[0] != "longrope" else set()
    full = {"layer_types": ["full_attention"] * again["num_hidden_layers"]}
    for key, value in config.items():
        found = again.get(key, full.get(key))
        if (
            key not in (*_NO_EFFECT, *unused)
            and not _same(value, found)
            and (found is not None or value not in _NEUTRAL)
        ):
            yield f"{key} {quoted(value)}"


def _rope_differences(config: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    if not _same(config["rope_theta"], again["rope_theta"]):
        yield f"rope_theta {quoted(config['rope_theta'])}"
    kind, given = _scaling(config)
    known = {
        "default": set(),
        "linear": {"factor"},
        "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
        "longrope": {"long_factor", "short_factor", "attention_factor", "original_max_position_embeddings", "factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }.get(kind)
    if known is None:
        yield f"rope_scaling of type {quoted(kind)}"
        return
    if kind == "longrope" and config["model_type"] != "phi3":
        yield f"rope_scaling of type 'longrope' for {config['model_type']}"
    for key, value in given.items():
        if key not in (*known, "rope_theta", "partial_rotary_factor") and value not in (None, True):
            yield f"rope_scaling.{key} {quoted(value)}"


def _same(a: object, b: object) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=_CLOSE)
    return a == b
