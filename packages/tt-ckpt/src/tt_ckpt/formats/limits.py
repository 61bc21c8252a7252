"""Settings that Meta's and torchtune's formats cannot express: each is refused by name before anything is written.

A format expresses what its own loader reads: ``params.json`` of Meta and of Mistral, or the arguments of torchtune's
builder of the family. A number that no loader reads would be lost silently.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tt_ckpt.formats.translation import positive
from tt_ckpt.shown import plain, quoted

FAMILIES = {"meta": ("llama", "mistral"), "torchtune": ("llama", "mistral", "gemma", "gemma2", "qwen2", "phi3")}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu")
# keys that no format has: the values with which they have no effect
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_sliding_window": (None, False),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "residual_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "quantization_config": (None,),
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")


def refuse_unsaid(config: Mapping[str, Any], to: str) -> None:
    """ValueError, in one line, for every setting in ``config`` that ``to`` (meta or torchtune) cannot express."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES[to]:
        name = {"meta": "Meta"}.get(to, to)
        known = f"families that do: {', '.join(FAMILIES[to])}"
        raise ValueError(f"config.json: model_type {quoted(family)} has no {name} format; {known}")
    if problems := list(_unsaid(config, to)):
        raise ValueError(
            f"config.json: {', '.join(problems)} cannot be expressed in the {to} format, whose loaders would compute "
            "something else; keep the hf format"
        )


def _unsaid(config: Mapping[str, Any], to: str) -> Iterator[str]:
    family = str(config.get("model_type"))
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            yield _shown(config, key)
    if config.get("attention_bias"):
        yield _shown(config, "attention_bias")
    for key in _SOFTCAPS:
        if family != "gemma2" and config.get(key) is not None:
            yield _shown(config, key)
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key) is not None and config[key] not in (_GELU if family.startswith("gemma") else _SILU):
            yield _shown(config, key)
    yield from _rope(config, family)
    yield from _window(config, family, to)
    heads, hidden = positive(config, "num_attention_heads"), positive(config, "hidden_size")
    says_head_dim = family.startswith("gemma") or (family, to) == ("mistral", "meta")
    if not says_head_dim and positive(config, "head_dim", default=hidden // heads) * heads != hidden:
        yield f"{_shown(config, 'head_dim')} beside hidden_size {hidden} and {heads} heads"
    tied = config.get("tie_word_embeddings", family.startswith("gemma"))
    fixed = {"mistral": False, "phi3": False, "gemma": True, "gemma2": True}
    if to == "torchtune" and bool(tied) != fixed.get(family, bool(tied)):
        yield f"tie_word_embeddings {str(bool(tied)).lower()} of {family}"


def _shown(config: Mapping[str, Any], key: str) -> str:
    return f"{key} {plain(config.get(key))}"


def _rope(config: Mapping[str, Any], family: str) -> Iterator[str]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters: expected an object, found {quoted(rope)}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3" and family == "llama":
        for key, value in _LLAMA3.items():
            if rope.get(key, value) != value:
                yield f"rope {key} {quoted(rope[key])} (only {value:g})"
    elif kind != "default":
        yield f"rope type {quoted(kind)}"


def _window(config: Mapping[str, Any], family: str, to: str) -> Iterator[str]:
    """A window that is shorter than the longest text. Llama has none; Qwen2 has a key that turns it on."""
    layers = config.get("layer_types") or []
    if not isinstance(layers, list):
        raise ValueError(f"config.json: layer_types: expected a list, found {quoted(layers)}")
    if family == "gemma2":
        if layers != [("full_attention" if i % 2 else "sliding_attention") for i in range(len(layers))]:
            yield "layer_types in another order than every second"
        return
    if len(set(map(str, layers))) > 1:
        yield "layer_types of several kinds"
    if family not in ("mistral", "phi3") or (family, to) == ("mistral", "meta"):
        return
    window, longest = window_of(config), positive(config, "max_position_embeddings", default=1 << 30)
    if window is not None and window < longest:
        yield f"sliding_window {window}"


def window_of(config: Mapping[str, Any]) -> int | None:
    """The window of a Mistral or Phi-3. A Mistral without the key has one of 4096 in transformers."""
    if config.get("sliding_window", 0) is None:
        return None
    if "sliding_window" not in config and config.get("model_type") != "mistral":
        return None
    return positive(config, "sliding_window", default=4096)
