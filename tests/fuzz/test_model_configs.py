"""config.json of every family: read, and if it is small built without memory; settings of generation."""

import dataclasses
import warnings
from typing import Any

import torch

import tt_models
from tt_models.auto import FAMILIES

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
ROPES: list[Any] = [
    None,
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": True},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
]


def seeds() -> list[dict[str, Any]]:
    """Each family as it is written, and each rope as files have it."""
    found = []
    for name, family in FAMILIES.items():
        fields = {field.name for field in dataclasses.fields(family.config)}
        small = {key: value for key, value in SMALL.items() if key in fields}
        plain = {"model_type": name, "rope_scaling": None} | small
        found.append(tt_models.config_to_hf(tt_models.config_from_hf(plain)))
        extra = {"torch_dtype": "bfloat16", "auto_map": {"x": "y"}, "quantization_config": {}, "layer_types": None}
        found += [plain | extra | {"rope_scaling": rope} for rope in ROPES if name != "phi3" or rope is None]
    return found


def test_any_config_is_read_or_one_of_our_errors(fuzz: Any) -> None:
    def read(config: Any) -> None:
        made = tt_models.config_from_hf(config)
        tt_models.config_from_hf(tt_models.config_to_hf(made))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if made.num_hidden_layers <= 8:
                tt_models.build(made, device="meta")

    fuzz(read, fuzz.mutated_json(*seeds()))


def test_any_settings_of_generation_give_tokens_or_one_of_our_errors(fuzz: Any) -> None:
    torch.set_num_threads(1)
    model = tt_models.build(tt_models.config_from_hf({"model_type": "llama"} | SMALL)).eval()
    settings = {
        "input_ids": [[1, 2, 3], [4]],
        "max_new_tokens": 2,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "eos_ids": [2, 3],
        "seed": 0,
        "pad_id": 0,
    }

    def generate(given: Any) -> None:
        if (
            isinstance(given, dict)
            and given.keys() <= settings.keys()
            and {"input_ids", "max_new_tokens"} <= given.keys()
        ):
            tt_models.generate(model, given.pop("input_ids"), **given)

    fuzz(generate, fuzz.mutated_json(settings))
