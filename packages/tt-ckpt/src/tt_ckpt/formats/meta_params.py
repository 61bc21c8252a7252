"""``params.json`` of Meta's and of Mistral's releases, from and to ``config.json``.

A config.json that is written has every key for which a reader would otherwise use a default: transformers gives a
Mistral without ``sliding_window`` a window of 4096.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tt_ckpt.formats.limits import window_of
from tt_ckpt.formats.translation import number, positive
from tt_ckpt.hf.weights import EMBEDDING
from tt_ckpt.safetensors_file import TensorSpec
from tt_ckpt.shown import plain, quoted

LLAMA3_VOCAB = 100_000  # from Llama 3 on the vocabulary is larger
_GATE = "model.layers.0.mlp.gate_proj.weight"
_READ = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "rope_theta", "vocab_size",
    "multiple_of", "ffn_dim_multiplier", "sliding_window", "use_scaled_rope", "rope_scaling_factor", "low_freq_factor",
    "high_freq_factor", "max_seq_len", "max_position_embeddings",
)  # fmt: skip
# keys without effect, and keys without effect if they have one of these values
_NO_EFFECT = ("max_batch_size", "model_parallel_size", "model_type", "flash", "dtype", "tied_embeddings")
_NEUTRAL: dict[str, tuple[object, ...]] = {"use_biases": (None, False), "causal": (None, True), "moe": (None,)}


def config_from_params(
    params: Mapping[str, Any], specs: Mapping[str, TensorSpec], tied: bool, file: Path
) -> dict[str, Any]:
    """A ``config.json`` from ``params.json`` and the shapes. ``max_position_embeddings`` is a guess by generation."""
    where = file.parent / "params.json"
    _refuse_unknown(params, where)
    mistral = "hidden_dim" in params
    heads = positive(params, "n_heads", where=where)
    theta = number(params, "rope_theta", default=10_000.0, where=where)
    vocab = specs[EMBEDDING].shape[0]
    llama3 = vocab >= LLAMA3_VOCAB and not mistral
    if _GATE not in specs:
        raise ValueError(f"{file}: contains no layers.0.feed_forward.w1.weight")
    hidden = positive(params, "dim", where=where)
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 128_000 if llama3 else 1,
        "eos_token_id": 128_001 if llama3 else 2,
        "head_dim": positive(params, "head_dim", default=hidden // heads, where=where),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": specs[_GATE].shape[0],
        "max_position_embeddings": _positions(params, theta, mistral, where),
        "model_type": "mistral" if mistral else "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": positive(params, "n_layers", where=where),
        "num_key_value_heads": positive(params, "n_kv_heads", default=heads, where=where),
        "rms_norm_eps": number(params, "norm_eps", default=1e-5, where=where),
        "rope_scaling": _rope_scaling(params, tied, where),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": str(specs[EMBEDDING].dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    if not mistral:
        return config | {"attention_bias": False, "mlp_bias": False}
    if positive(params, "hidden_dim", where=where) != specs[_GATE].shape[0]:
        rows = specs[_GATE].shape[0]
        raise ValueError(f"{where}: hidden_dim {params['hidden_dim']} does not fit w1 with {rows} rows")
    window = params.get("sliding_window")
    return config | {"sliding_window": None if window is None else positive(params, "sliding_window", where=where)}


def _refuse_unknown(params: Mapping[str, Any], where: Path) -> None:
    """ValueError for a key that may change the computation and has no place in a config.json of these families."""
    for key, value in params.items():
        if key in _READ or key in _NO_EFFECT or value in _NEUTRAL.get(key, ()):
            continue
        close = difflib.get_close_matches(key, _READ, 1, 0.8)
        hint = f"; did you mean {close[0]}?" if close else "; give config=DIR with the config.json of the same model"
        what = "may change what the model computes and is not known"
        raise ValueError(f"{where}: {plain(key)} {quoted(value)} {what}{hint}")


def _rope_scaling(params: Mapping[str, Any], tied: bool, where: Path) -> dict[str, Any] | None:
    if not params.get("use_scaled_rope"):
        return None
    factor = 32.0 if tied else 8.0  # the small models of 3.2 are the tied ones
    return {
        "rope_type": "llama3",
        "factor": number(params, "rope_scaling_factor", default=factor, where=where),
        "low_freq_factor": number(params, "low_freq_factor", default=1.0, where=where),
        "high_freq_factor": number(params, "high_freq_factor", default=4.0, where=where),
        "original_max_position_embeddings": 8192,
    }


def _positions(params: Mapping[str, Any], theta: float, mistral: bool, where: Path) -> int:
    for key in ("max_position_embeddings", "max_seq_len"):
        if params.get(key):
            return positive(params, key, where=where)
    if mistral:
        return 32_768
    if params.get("use_scaled_rope"):
        return 131_072
    return {500_000.0: 8192, 1_000_000.0: 16_384}.get(theta, 4096)


def params_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``params.json`` for a ``config.json`` of either generation (``rope_theta`` or ``rope_parameters``)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters: expected an object, found {quoted(rope)}")
    heads, hidden = positive(config, "num_attention_heads"), positive(config, "hidden_size")
    params: dict[str, Any] = {
        "dim": hidden,
        "n_layers": positive(config, "num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": positive(config, "num_key_value_heads", default=heads),
        "vocab_size": positive(config, "vocab_size"),
        "norm_eps": number(config, "rms_norm_eps"),
        "rope_theta": number(rope, "rope_theta", default=number(config, "rope_theta", default=10_000.0)),
    }
    head_dim = positive(config, "head_dim", default=hidden // heads)
    if config["model_type"] == "mistral":
        params |= {"hidden_dim": positive(config, "intermediate_size"), "head_dim": head_dim}
        params |= {} if (window := window_of(config)) is None else {"sliding_window": window}
    else:
        params |= feed_forward_params(hidden, positive(config, "intermediate_size"))
    if (rope.get("rope_type") or rope.get("type")) == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": number(rope, "factor")}
    return params


def feed_forward_params(hidden: int, intermediate: int) -> dict[str, Any]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that give ``intermediate`` by Meta's rule."""
    base = 8 * hidden // 3
    for multiple_of in (256, 1024, 4096):
        for multiplier in (None, 1.3, 1.5, 1.4, 1.2, 1.0):
            size = base if multiplier is None else int(multiplier * base)
            if -(-size // multiple_of) * multiple_of == intermediate:
                return {"multiple_of": multiple_of} | ({"ffn_dim_multiplier": multiplier} if multiplier else {})
    return {"multiple_of": 1, "ffn_dim_multiplier": (intermediate + 0.5) / base}
