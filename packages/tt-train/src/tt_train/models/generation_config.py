"""What generation_config.json says about drawing tokens. ``tt chat`` and ``tt generate`` start from it.

https://huggingface.co/docs/transformers/main_classes/text_generation. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ckpt.shown import plain, quoted
from tt_train.errors import ConfigError
from tt_train.records.run_files import read_json
from tt_train.run.serving import generation_file

_TOP_K = 50  # transformers' own, of a model that is to be sampled from and names none
_DRAWN = {"temperature": (1e-5, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
# what says nothing about the text of one answer, or is read by the tokenizer
_SILENT = (
    "transformers_version", "_from_model_config", "bos_token_id", "pad_token_id", "eos_token_id", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "decoder_start_token_id", "low_memory",
    "compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size", "trust_remote_code",
    "remove_invalid_values", "renormalize_logits", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size",
)  # fmt: skip
# values with which a key changes nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "encoder_repetition_penalty": (1,),
    "length_penalty": (0, 1), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "num_beams": (1,),
    "num_beam_groups": (1,), "diversity_penalty": (0,), "early_stopping": (False,), "num_return_sequences": (1,),
    "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,), "max_length": (20,), "penalty_alpha": (0,),
    "token_healing": (False,), "use_mtp": (False,), "temperature": (1,), "top_k": (0, 50), "top_p": (1,),
    "min_p": (0,), "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "stop_strings": ([],), "sequence_bias": ({}, []),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a model's own settings draw tokens; without a file greedily. ``notes``: settings that are not followed."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sampling_defaults(places: Sequence[Path]) -> SamplingDefaults:
    """Those of the nearest generation_config.json; ``places`` as of an ``Origin``. ConfigError for a wrong value."""
    file = generation_file(places)
    return SamplingDefaults() if file is None else read_defaults(read_json(file), str(plain(file)))


def read_defaults(settings: Mapping[str, Any], name: str) -> SamplingDefaults:
    """The settings of a file called ``name``, with the meaning that transformers gives them.

    Without ``do_sample`` the likeliest token is taken, whatever ``temperature`` and its like say. With it,
    ``temperature`` is 1.0 and ``top_k`` 50 unless the file has others.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    draws = given.pop("do_sample", False)
    if not isinstance(draws, bool):
        raise ConfigError([f"{name}: do_sample: expected true or false, got {quoted(draws)}"])
    most, stop = given.pop("max_new_tokens", None), given.pop("stop_strings", [])
    found: dict[str, Any] = {"repetition_penalty": given.pop("repetition_penalty", 1.0), "max_new_tokens": most}
    if not _is_number(found["repetition_penalty"]) or not 1e-3 <= found["repetition_penalty"] <= 1e3:
        wrong = quoted(found["repetition_penalty"])
        raise ConfigError([f"{name}: repetition_penalty: expected a number from 0.001 to 1000, got {wrong}"])
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or not 1 <= most < 2**31):
        raise ConfigError([f"{name}: max_new_tokens: expected a whole number of at least 1, got {quoted(most)}"])
    found["stop"] = _texts(stop, name)
    idle = []
    if draws:
        found |= _drawn(given, name)
    else:
        idle = [key for key in (*_DRAWN, "top_k") if not _says_nothing(key, given.pop(key, None))]
    notes = [f"{', '.join(idle)}: no effect without do_sample"] if idle else []
    left = {key: value for key, value in given.items() if key not in _SILENT and not _says_nothing(key, value)}
    if left:
        notes.append(f"not supported, no effect here: {', '.join(f'{k}={quoted(v)}' for k, v in sorted(left.items()))}")
    return SamplingDefaults(**found, notes=tuple(f"{name}: {note}" for note in notes))


def _drawn(given: dict[str, Any], name: str) -> dict[str, Any]:
    """``temperature``, ``top_k``, ``top_p`` and ``min_p``, taken out of ``given``."""
    found: dict[str, Any] = {"temperature": 1.0}
    for key, (least, most) in _DRAWN.items():
        value = given.pop(key, None)
        if value is None:
            continue
        zero = key == "temperature" and value == 0  # which transformers refuses, and others read as greedy
        if not _is_number(value) or not (least <= value <= most or zero) or (key == "top_p" and value == 0):
            raise ConfigError([f"{name}: {key}: expected a number from {least:g} to {most:g}, got {quoted(value)}"])
        found[key] = float(value)
    top_k = given.pop("top_k", _TOP_K)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not -1 <= top_k < 2**31:
        raise ConfigError([f"{name}: top_k: expected a whole number, 0 for all tokens, got {quoted(top_k)}"])
    return found | {"top_k": top_k if top_k > 0 else None}


def _texts(value: object, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError([f"{name}: stop_strings: expected texts, got {quoted(value)}"])
    return tuple(texts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _says_nothing(key: str, value: object) -> bool:
    return value is None or value in _NEUTRAL.get(key, ())
