"""``config.json`` from the key-value pairs of a GGUF file. Every key of the architecture is used or refused."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tt_ckpt.formats.gguf.file import GGUF, read_rows
from tt_ckpt.shown import plain, quoted

_CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "phi3": "Phi3",
    "olmo2": "Olmo2", "smollm3": "SmolLM3",
}  # fmt: skip
# llama.cpp decides by the number of layers, since no key says it: scores are divided by sqrt(hidden / heads)
_WIDE_SCORES = {"gemma2": 46, "gemma3_text": 62}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_NO_TOKEN = 2**32 - 1
_NO_EFFECT = ("tensor_data_layout", "rope.scaling.finetuned")  # about the making of the file and the weights
# keys without effect if they have one of these values
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "pooling_type": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0,),
    "rope.scale_linear": (1.0,),
}


class Keys:
    """The keys of one architecture, checked when read; ``refuse_the_rest`` names a key that was not read."""

    def __init__(self, gguf: GGUF) -> None:
        self.path, self.prefix = gguf.path, f"{gguf.values.get('general.architecture')}."
        own = [(key, value) for key, value in gguf.values.items() if key.startswith(self.prefix)]
        self.values = {key.removeprefix(self.prefix): value for key, value in own}
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        self.read.add(key)
        return self.values.get(key)

    def number(self, key: str, default: float | None = None, *, whole: bool = False) -> Any:
        """A finite number above 0. Some files have one per layer, which must all be the same."""
        value = self.get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None:
            if default is None:
                raise ValueError(f"{self.path}: lacks {self.prefix}{key}, without which there is no config.json")
            return default
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < 2**40:
            what = f"expected one {'whole ' if whole else ''}number above 0, found {quoted(value)}; download it again"
            raise ValueError(f"{self.path}: {self.prefix}{key}: {what}")
        return value if whole else float(value)

    def whole(self, key: str, default: int | None = None) -> int:
        value: int = self.number(key, default, whole=True)
        return value

    def refuse_the_rest(self) -> None:
        if left := sorted(self.values.keys() - self.read):
            close = difflib.get_close_matches(left[0], sorted(self.read), 1, 0.6)
            hint = f"; the nearest known is {self.prefix}{close[0]}" if close else ""
            raise ValueError(
                f"{self.path}: {self.prefix}{plain(left[0])} may change what the model computes and is not known here"
                f"{hint}; use another file of the model"
            )


def config_of(gguf: GGUF, model_type: str) -> dict[str, Any]:
    """The config by the keys and by the tensors' names and shapes, with every number that a reader would default."""
    keys = Keys(gguf)
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", keys.whole("rope.dimension_count", -1))
    if "attention.key_length" not in keys.values and (head_dim < 0 or model_type == "phi3"):
        head_dim = hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        same = keys.whole(key, head_dim)
        if same != head_dim and (model_type, key) != ("phi3", "rope.dimension_count"):
            raise ValueError(f"{gguf.path}: {keys.prefix}{key} {same} is not converted: a head has {head_dim}")
    config: dict[str, Any] = {
        "architectures": [f"{_CLASSES[model_type]}ForCausalLM"],
        "attention_bias": _has(gguf, "attn_output.bias"),
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.whole("block_count"),
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "sliding_window": None,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "float32",
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
    }
    config |= {name: token_id(gguf, key) for name, key in _TOKENS.items()}
    config |= _extras(gguf, keys, config)
    config["rope_scaling"] = _rope_scaling(gguf, keys, config)
    if keys.whole("vocab_size", config["vocab_size"]) != config["vocab_size"]:
        raise ValueError(f"{gguf.path}: {keys.prefix}vocab_size does not fit token_embd.weight: {config['vocab_size']}")
    for key in _NO_EFFECT:
        keys.get(key)
    for key, neutral in _NEUTRAL.items():
        if (value := keys.get(key)) not in (None, *neutral):
            what = f"{keys.prefix}{key} {quoted(value)}"
            raise ValueError(f"{gguf.path}: {what} is not converted; use another file of the model")
    keys.refuse_the_rest()
    return config


def _has(gguf: GGUF, local: str) -> bool:
    return f"blk.0.{local}" in gguf.tensors


def token_id(gguf: GGUF, key: str) -> int | None:
    """The id of a special token (bos, eos, eot, ...); None if the file names none."""
    value = gguf.values.get(f"tokenizer.ggml.{key}_token_id")
    if value is None or value == _NO_TOKEN:
        return None
    rows = gguf.tensors["token_embd.weight"].shape[0]
    if type(value) is not int or not 0 <= value < rows:
        where = f"{gguf.path}: tokenizer.ggml.{key}_token_id"
        raise ValueError(f"{where}: expected a whole number below {rows}, found {quoted(value)}")
    return value


def _extras(gguf: GGUF, keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that only the config of this family has."""
    kind = config["model_type"]
    if kind.startswith("gemma"):
        return _gemma(keys, config)
    found: dict[str, Any] = {}
    if kind in ("mixtral", "qwen3_moe"):
        experts = keys.whole("expert_count")
        found |= {"num_experts_per_tok": keys.whole("expert_used_count")}
        found |= {"num_local_experts": experts} if kind == "mixtral" else _qwen3_moe(keys, config, experts)
    elif keys.get("expert_count") or keys.get("expert_used_count"):
        raise ValueError(f"{gguf.path}: {keys.prefix}expert_count: experts are converted for llama and qwen3moe only")
    if kind in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
        found |= {"use_sliding_window": False}
    if kind == "llama":
        found["mlp_bias"] = _has(gguf, "ffn_down.bias")
    if kind != "qwen2":
        biases = [local for local in ("q", "k", "v", "output") if _has(gguf, f"attn_{local}.bias")]
        if len(biases) not in (0, 4):
            raise ValueError(f"{gguf.path}: has biases of {', '.join(biases)} only, which no supported model_type has")
    if kind == "smollm3":
        layers = config["num_hidden_layers"]  # every fourth has no rope, which llama.cpp knows without a key
        found |= {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)], "no_rope_layer_interval": 4}
        found |= {"mlp_bias": False}
    if keys.values.get("attention.sliding_window"):
        if kind not in ("llama", "mixtral", "phi3"):
            raise ValueError(f"{gguf.path}: {keys.prefix}attention.sliding_window is not converted for {kind}")
        found["sliding_window"] = keys.whole("attention.sliding_window")
        if kind == "llama":
            found |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    keys.get("attention.sliding_window")
    if kind == "phi3":
        turned = keys.whole("rope.dimension_count", config["head_dim"])
        found["partial_rotary_factor"] = turned / config["head_dim"]
        old = keys.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
        found["original_max_position_embeddings"] = old
    return found


def _qwen3_moe(keys: Keys, config: Mapping[str, Any], experts: int) -> dict[str, Any]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": keys.whole("expert_feed_forward_length", config["intermediate_size"]),
        "norm_topk_prob": True,  # as llama.cpp computes it
        "num_experts": experts,
    }


def _gemma(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    kind, layers, head_dim = config["model_type"], config["num_hidden_layers"], config["head_dim"]
    found: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if kind == "gemma":
        return found
    wide = layers == _WIDE_SCORES[kind]
    found["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if wide else head_dim
    period = 2 if kind == "gemma2" else 6
    slides = [(i + 1) % period != 0 for i in range(layers)]
    if keys.get("attention.sliding_window_pattern") not in (None, period, slides):
        raise ValueError(f"{keys.path}: {keys.prefix}attention.sliding_window_pattern: only {period} is converted")
    found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        found[name] = keys.number(name, default) if kind == "gemma2" or name in keys.values else None
    if kind == "gemma2":
        return found | {"sliding_window": keys.whole("attention.sliding_window", 4096)}
    found |= {"sliding_window": keys.whole("attention.sliding_window"), "sliding_window_pattern": 6}
    return found | {"rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0)}


# ---- rope ------------------------------------------------------------------------------------------------------------


def _rope_scaling(gguf: GGUF, keys: Keys, config: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type") or "none"
    factors = {name: gguf.tensors.get(f"rope_{name}.weight") for name in ("freqs", "factors_long", "factors_short")}
    for name, tensor in factors.items():
        if tensor is not None and (len(tensor.shape) != 1 or tensor.shape[0] > config["head_dim"]):
            raise ValueError(f"{gguf.path}: rope_{name}.weight has the shape {list(tensor.shape)}; download it again")
    if any(name.startswith("blk.") and "rope_f" in name for name in gguf.tensors):
        raise ValueError(f"{gguf.path}: rope factors in every block are not converted; use a newer file of the model")
    given = {name: tensor for name, tensor in factors.items() if tensor is not None}
    numbers = {name: read_rows(tensor, 0, 1, torch.float32)[0] for name, tensor in given.items()}
    old_context = keys.get("rope.scaling.original_context_length")
    if "factors_long" in numbers and "factors_short" in numbers:
        return _longrope(numbers["factors_long"], numbers["factors_short"], keys, config)
    if "freqs" in numbers:
        return _llama3_scaling(numbers["freqs"], config, old_context, gguf.path)
    if kind == "none":
        return None
    factor = keys.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        what = f"{keys.prefix}rope.scaling.type {quoted(kind)}"
        raise ValueError(f"{gguf.path}: {what} is not known; known: none, linear, yarn")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if keys.get(f"rope.scaling.{theirs}") is not None:
            scaling[ours] = keys.number(f"rope.scaling.{theirs}")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if keys.number(f"rope.scaling.{key}", 1.0) != 1.0:
            raise ValueError(f"{gguf.path}: {keys.prefix}rope.scaling.{key} other than 1 is not converted")
    return scaling


def _longrope(long: torch.Tensor, short: torch.Tensor, keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    scaling: dict[str, Any] = {"type": "longrope", "long_factor": _plain(long), "short_factor": _plain(short)}
    positions, old = config["max_position_embeddings"], config["original_max_position_embeddings"]
    derived = math.sqrt(1 + math.log(positions / old) / math.log(old)) if positions > old > 1 else 1.0
    stated = keys.number("rope.scaling.attn_factor", derived)
    return scaling if math.isclose(stated, derived, rel_tol=1e-5) else scaling | {"attention_factor": stated}


def _plain(factors: torch.Tensor) -> list[float]:
    return [float(str(value)) for value in factors.numpy()]


def _llama3_scaling(
    factors: torch.Tensor, config: Mapping[str, Any], old_context: object, path: Path
) -> dict[str, Any]:
    """The numbers of Llama 3.1's rule that give ``factors``, by which llama.cpp divides the frequencies.

    The file has only the factors, so the original context of the rule is found by trying. Contexts that give the same
    factors are the same model.
    """
    dim = config["head_dim"]
    frequencies = config["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    largest, low, high = float(factors.max()), 1.0, 4.0
    if len(factors) != dim // 2:
        raise ValueError(f"{path}: rope_freqs.weight has {len(factors)} factors, {dim // 2} are needed")
    contexts = [old_context] if type(old_context) is int else [8192, *(2**n for n in range(24))]
    for context in contexts:
        share = ((context * frequencies / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        meant = 1 / ((1 - share) / largest + share)
        if torch.allclose(meant, factors.double(), rtol=1e-4, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": round(largest, 6),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise ValueError(f"{path}: rope_freqs.weight does not follow Llama 3.1's rule, the only one that is converted")
