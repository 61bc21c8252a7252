"""Keys of ``config.json`` that are not fields of a config: which are ignored, and which must agree.

Ignored: keys that do not change the logits (provenance, settings for generation, training and serving, other heads),
and a feature that is switched off. A key that changes the maths must have the value that is computed here. Any other
key is refused: it is a typo, or belongs to a different architecture than that of ``model_type``.
"""

import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from tt_models.limits import LONGEST_KEY
from tt_models.rope import check_rope_scaling
from tt_models.shown import shown

WITHOUT_EFFECT_BY_KIND = {
    "provenance and other software": """
        architectures attn_implementation author auto_map base_model base_model_name_or_path checkpoint commit
        created_by creator datasets date description dtype finetuning_task framework is_composition is_llama_config
        language languages license metrics model_name model_name_or_path model_version neuron original_vocab_size
        pad_to_multiple_of padded_vocab_size params_dtype pretraining_tp revision source tags task_specific_params
        tensor_parallel tensor_parallel_degree tensor_parallel_output torch_dtype torchscript type_vocab_size
        use_bfloat16 use_cpu_initialization version vocab_file
    """,
    "other heads, and what a forward pass hands out": """
        classifier_activation classifier_bias classifier_dropout head_dtype id2label is_decoder
        keys_to_ignore_at_inference label2id num_labels output_attentions output_hidden_states output_logits output_past
        output_router_logits output_scores problem_type return_dict return_dict_in_generate tie_encoder_decoder
        use_return_dict
    """,
    "generation": """
        bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config constraints
        continuous_batching_config disable_compile diversity_penalty do_sample dola_layers early_stopping
        encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
        exponential_decay_length_penalty force_words_ids guidance_scale is_assistant length_penalty low_memory
        max_cache_len max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p
        no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
        num_return_sequences penalty_alpha prefill_chunk_size prefix prompt_lookup_num_tokens remove_invalid_values
        renormalize_logits repetition_penalty sequence_bias speculation_type stop_strings suppress_tokens
        target_lookbehind temperature token_healing top_h top_k top_p typical_p use_mtp watermarking_config
    """,
    "lengths for tokenizers, trainers and servers (max_position_embeddings is the one that counts)": """
        context_length dual_chunk_attention_config max_context_length max_model_len max_seq_len max_seq_length
        max_sequence_length max_window_layers model_max_length n_ctx n_positions seq_len seq_length sequence_length
    """,
    "training": """
        activation_checkpointing aux_loss_alpha batch_size bf16 data_seed debug do_eval do_predict do_train
        ep_size epochs ffn_dim_multiplier fp16 fp32 full_determinism global_batch_size greater_is_better
        group_by_length ignore_data_skip init_std initializer_factor initializer_std label_names label_smoothing
        label_smoothing_factor learning_rate liger_kernel load_best_model_at_end load_in_4bit load_in_8bit
        local_rank loss_type max_grad_norm max_steps metric_for_best_model micro_batch_size mixed_precision
        model_parallel_size momentum multiple_of neftune_noise_alpha output_dir pp_size precision project
        remove_unused_columns report_to resume_from_checkpoint router_aux_loss_coef run_name sample_packing seed
        seq_aux sequence_parallel tf32 torch_compile tp_size use_liger_kernel val_set_size weight_decay
    """,
}
WITHOUT_EFFECT = frozenset(word for words in WITHOUT_EFFECT_BY_KIND.values() for word in words.split())
WITHOUT_EFFECT_LIKE = re.compile(
    r"_.*|.*_token|.*_token_(id|ids|index)|.*(aux|z)_loss.*|.*_(version|revision|name_or_path|parallel_degree|pp_degree)"
    r"|(adam|assistant|axolotl|bnb|chat_template|dataloader|dataset|ddp|deepspeed|eval|flash_attn|forced|fsdp|fuse|fused"
    r"|gradient|hub|image|logging|log|lora|lr|num_train|optim|optimizer|peft|per_device|push_to_hub|recompute|save"
    r"|summary|tf_legacy|tokenizer|train|training|transformers|trust_remote_code|unsloth|use_cache|use_flash|use_fused"
    r"|use_recompute|use_sdpa|video|vision_end|vision_start|vllm|wandb|warmup|xla)([_.].*)?"
)

# Names that other families and libraries have for fields.
SAME_AS = {
    "hidden_act": "activation activation_function hidden_activation mlp_activation mlp_hidden_act",
    "hidden_size": "d_model dim embed_dim n_embd",
    "num_hidden_layers": "n_layer n_layers num_layers",
    "num_attention_heads": "n_head n_heads num_heads",
    "num_key_value_heads": "n_head_kv n_kv_heads num_kv_heads num_query_groups",
    "head_dim": "attention_head_dim d_head head_size kv_channels query_pre_attn_scalar rotary_dim",
    "intermediate_size": "d_ff ffn_dim ffn_hidden_size mlp_hidden_size n_inner",
    "rms_norm_eps": "layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon rms_norm_epsilon",
    "rope_theta": "rope_base rope_freq_base rotary_base rotary_emb_base",
    "tie_word_embeddings": "share_embedding tie_embeddings tie_weights weight_tying",
}
FIELD_OF = {other: name for name, others in SAME_AS.items() for other in others.split()}
SAME_WORD = {"swiglu": "silu", "swish": "silu", "geglu": "gelu"}

# Keys that change the maths in general, with the values that mean what is computed here.
OFF = (False, 0, None)
COMPUTED: dict[str, tuple[Any, ...]] = {
    name: values
    for names, values in {
        # biases, and what is learned in addition to the usual weights
        "add_bias_linear add_qkv_bias attention_bias attention_out_bias attention_output_bias attn_bias bias ffn_bias "
        "lm_head_bias mlp_bias norm_bias o_bias o_proj_bias out_bias qkv_bias use_bias use_mlp_bias use_qkv_bias": OFF,
        "attention_sink attn_gate attn_output_gate qk_layernorm qk_norm use_attention_sinks use_qk_layernorm "
        "use_qk_norm": OFF,
        "n_routed_experts n_shared_experts num_experts num_local_experts num_nextn_predict_layers num_shared_experts "
        "shared_expert_intermediate_size": OFF,
        # dropout of other places than attention_dropout
        "attention_dropout_prob attention_probs_dropout_prob attn_dropout attn_pdrop dropout embd_pdrop "
        "embedding_dropout hidden_dropout hidden_dropout_prob resid_pdrop residual_dropout router_jitter_noise": OFF,
        # who sees whom, and how scores are made
        "add_cross_attention alibi attention_chunk_size attn_temperature_tuning bidirectional "
        "cross_attention_hidden_size is_encoder_decoder multi_query parallel_attn parallel_residual "
        "scale_attn_by_inverse_layer_idx use_alibi use_bidirectional_attention use_logn_attn "
        "use_parallel_residual": OFF,
        "attn_logit_softcapping clip_qkv final_logit_softcapping logit_softcap logits_soft_cap qkv_clip": OFF,
        "causal causal_attention is_causal scale_attn_weights use_causal_mask": (True,),
        # positions
        "rope_interleaved rotary_interleaved use_dynamic_ntk use_mrope": OFF,
        "rotary use_rope use_rotary_embedding": (True,),
        "partial_rotary_factor rope_condense_ratio rope_pct rope_ratio rotary_pct rotary_percent": (1,),
        "pos_emb_type position_embedding_type": ("rope", "rotary"),
        # scales, norms, gates, weights of fewer bits
        "embedding_multiplier embedding_scale full_attn_mod interpolate_factor logit_scale logits_scaling "
        "residual_multiplier scale_emb": (1,),
        "layer_norm_type norm norm_type normalization normalization_type": ("rms_norm", "rmsnorm", "RMSNorm", "rms"),
        "gated_mlp glu no_bias rms_norm use_gated_mlp use_glu use_rms_norm use_swiglu": (True,),
        "chunk_size_feed_forward input_bits pruned_heads weight_bits": OFF,
    }.items()
    for name in names.split()
}


def has_no_effect(key: str) -> bool:
    """Whether no value of ``key`` changes the logits."""
    return key in WITHOUT_EFFECT or WITHOUT_EFFECT_LIKE.fullmatch(key) is not None


def is_off(value: Any) -> bool:
    """Whether this value switches a feature off: null, false, zero, or empty."""
    return value is None or value in (False, 0, "", [], {})


def refuse_unlike(
    keys: Mapping[str, Any], computed: Mapping[str, tuple[Any, ...]], names: Collection[str], *, model_type: str
) -> None:
    """ValueError unless each of ``keys``, none of which is a field, means what is computed; null means "not set".

    ``computed`` has the values that do, for keys whose values are known; ``names`` are the names of the fields.
    """
    wrong = []
    for key, value in keys.items():
        values = computed.get(key)
        if value is None or (values is not None and any(is_same(value, one) for one in values)):
            continue
        close = difflib.get_close_matches(str(key), sorted(names), n=1, cutoff=0.6)
        if values is not None:
            how = "without it" if is_off(values[0]) else f"with {shown(values[0])}"
            wrong.append(f"{key} = {shown(value)} is not supported, {model_type} is computed {how}")
        elif not is_off(value) or difflib.get_close_matches(str(key), names, n=1, cutoff=0.85):
            hint = f", nearest known key {close[0]!r}" if close else ""
            wrong.append(f"unknown key {shown(key)} with value {shown(value)}{hint}")
    if wrong:
        raise ValueError(
            f"config.json: {several(wrong)}; remove a key that has no effect on the logits of this model, else use "
            "a model without it"
        )


def is_same(value: Any, computed: Any) -> bool:
    """Whether a value of a file means ``computed``: all ways to say "off" are equal, and some words have synonyms."""
    if isinstance(value, str):
        return computed in (value, SAME_WORD.get(value))
    if isinstance(value, list | tuple) and isinstance(computed, list | tuple):
        return list(value) == list(computed)
    return bool(value == computed) or (is_off(value) and is_off(computed))


QUANTIZATION = ("quantization_config", "quantization", "compression_config", "quant_config")


def pop_quantization(keys: dict[str, Any]) -> None:
    """Remove the keys of quantization; ValueError if the weights are quantized, which needs another loader."""
    for key in QUANTIZATION:
        settings = keys.pop(key, None)
        if not settings or (isinstance(settings, Mapping) and is_unquantized(settings)):
            continue
        method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
        named = method if isinstance(method, str) and method.isidentifier() and len(method) < 40 else shown(method)
        raise ValueError(
            f"config.json: {key}: {named}; only unquantized weights are read: use the original model, or dequantize "
            "this one and remove the key"
        )


def is_unquantized(settings: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes is configured but not used, as some tools leave it."""
    return settings.get("quant_method") in (None, "bitsandbytes") and not any(
        settings.get(name, name not in settings) for name in ("load_in_4bit", "load_in_8bit")
    )


def refuse_wrong_types(keys: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Every value must have the type of its field: no text for numbers, no true for 1."""
    wrong = []
    for key, value in keys.items():
        if not fits(value, hints[key]):
            accepted = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
            names = " or ".join(getattr(kind, "__name__", str(kind)).replace("NoneType", "null") for kind in accepted)
            wrong.append(f"{key} must be {names}, got {shown(value)}{instead(value, accepted)}")
    if wrong:
        raise ValueError(several(wrong))


def instead(value: Any, accepted: Collection[Any]) -> str:
    """The closest value that is right, if the type alone is wrong: 12 instead of "12" or 12.0."""
    text = value.strip() if isinstance(value, str) else repr(value) if isinstance(value, float) else ""
    if int in accepted and (whole := re.fullmatch(r"(-?\d{1,12})(\.0+)?", text)):
        return f" (write {int(whole[1])})"
    if float in accepted and re.fullmatch(r"-?\d{1,12}(\.\d{1,12})?(e[+-]?\d{1,2})?", text):
        return f" (write {float(text):g})"
    if bool in accepted and (text.lower() in ("true", "false") or value in (0, 1)):
        return f" (write {str(text.lower() == 'true' or value == 1).lower()})"
    return ""


def several(wrong: Collection[str], count: int = 5) -> str:
    """The first mistakes of many, and how many more there are."""
    return "; ".join([*wrong][:count]) + (f"; and {len(wrong) - count:,} more" if len(wrong) > count else "")


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value``, out of a JSON file, may be used as ``kind``."""
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
    close = difflib.get_close_matches(word[:LONGEST_KEY], sorted(names), n=1, cutoff=0.6)
    return f"{shown(word)}: " + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(names))}")


def with_original_length(rope: Mapping[str, Any], beside: Any, longest: Any, *, inner: bool = False) -> dict[str, Any]:
    """``rope``, or each of its parts by kind of layer, with ``original_max_position_embeddings`` if it needs one."""
    key = "original_max_position_embeddings"
    if rope.get("rope_type", rope.get("type")) in ("llama3", "yarn", "longrope"):
        if None not in (beside, rope.get(key)) and beside != rope[key]:
            raise ValueError(given_twice(key, beside, rope[key]))
        return {**rope, key: rope.get(key) or beside or longest}
    parts = {name: part for name, part in rope.items() if isinstance(part, Mapping) and not inner}
    return {**rope} | {name: with_original_length(part, beside, longest, inner=True) for name, part in parts.items()}


def given_twice(key: str, one: Any, other: Any) -> str:
    """The message about a number that two places of a config.json give differently."""
    return f"config.json: {key} is given twice and differently: {shown(one)} and {shown(other)}"


def split_rope_parameters(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Flat ``rope_theta`` and ``rope_scaling`` out of the rope keys of a config.json, refusing contradictions."""
    thetas = [keys["rope_theta"]] if keys.get("rope_theta") is not None else []
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = keys.get(name)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(f"config.json: {name} must be a mapping, got {shown(rope)}")
        if rope.get("rope_theta") is not None:
            thetas.append(rope["rope_theta"])
        whole_head = rope.get("partial_rotary_factor") == 1
        without = {"rope_theta", "partial_rotary_factor"} if whole_head else {"rope_theta"}
        scalings.append(check_rope_scaling({key: value for key, value in rope.items() if key not in without}))
    for name, found in (("rope_theta", thetas), ("rope_scaling", scalings)):
        if any(value != found[0] for value in found[1:]):
            raise ValueError(given_twice(name, found[0], found[-1]))
    return ({"rope_theta": thetas[0]} if thetas else {}) | ({"rope_scaling": scalings[0]} if scalings else {})
