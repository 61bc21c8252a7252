"""Keys of ``config.json`` that are not fields of a config: which may be passed over, and which may not."""

import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

# Keys of config.json that leave the logits as they are: provenance, generation and serving settings, other heads.
WITHOUT_EFFECT = frozenset(
    [
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_name_or_path", "_sliding_window_pattern", "architectures", "attn_implementation", "auto_map", "bad_words_ids",
        "begin_suppress_tokens", "bos_token", "cache_implementation", "decoder_start_token_id",
        "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
        "eos_token", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_llama_config",
        "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "model_max_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_beam_groups", "num_beams",
        "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
        "output_router_logits", "output_scores", "pad_token", "prefix", "pretraining_tp", "problem_type",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "tie_encoder_decoder", "tokenizer_class",
        "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version",
        "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
        # read by other families, or by nobody any more
        "max_sequence_length", "max_window_layers", "tokenizer_model_max_length", "tokenizer_padding_side",
        "unk_token_id", "use_flash_attn", "_flash_attn_2_enabled",
    ]
)  # fmt: skip

# Keys that change the maths in general and are harmless at one value.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attn_pdrop": (0,),
    "attention_bias": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "embd_pdrop": (0,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "resid_pdrop": (0,),
    "router_jitter_noise": (0,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}


def refuse_quantized(keys: Mapping[str, Any]) -> None:
    """Quantized repositories need another loader."""
    quantization = keys.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"config.json: quantization_config: {method}; only unquantized weights are read, take the original model"
        )


def refuse_unknown(keys: Mapping[str, Any], names: Collection[str]) -> None:
    """Every key that may change the maths must be known; null means that it is not set."""
    wrong = []
    for key, value in keys.items():
        if value is None:
            continue
        if key not in ONLY_VALUE:
            close = difflib.get_close_matches(str(key), sorted(names), n=1, cutoff=0.6)
            hint = f", nearest known key {close[0]!r}" if close else ""
            wrong.append(f"unknown key {key!r} with value {value!r}{hint}")
        elif value not in ONLY_VALUE[key]:
            wrong.append(f"{key} = {value!r} is not supported, only {ONLY_VALUE[key][0]!r}")
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}; a key without effect on the logits may be removed")


def refuse_wrong_types(keys: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Every value must have the type of its field: no text for numbers, no true for 1."""
    wrong = []
    for key, value in keys.items():
        if not fits(value, hints[key]):
            accepted = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
            names = " or ".join(getattr(kind, "__name__", str(kind)).replace("NoneType", "null") for kind in accepted)
            wrong.append(f"{key} must be {names}, got {value!r}")
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}")


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value``, out of a JSON file, may be taken for ``kind``."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(fits(element, typing.get_args(kind)[0]) for element in value)
    kind = typing.get_origin(kind) or kind
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def nearest(word: str, names: Collection[str]) -> str:
    """``word`` quoted, with the closest of ``names`` or all of them."""
    close = difflib.get_close_matches(str(word), sorted(names), n=1, cutoff=0.6)
    return f"{word!r}: " + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(names))}")
