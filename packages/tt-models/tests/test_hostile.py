"""Configs and generation settings of an attacker or an accident: refused by key, before anything is built."""

import json
import math

import pytest
import torch

import tt_models
from tt_models.auto import FAMILIES
from tt_models.limits import LIMITS

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "pad_token_id": None,
}
LLAMA = {"model_type": "llama"} | TINY
DEEP = {}
for _ in range(5000):
    DEEP = {"a": DEEP}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16}


def refused(config, match):
    with pytest.raises(ValueError, match=match) as error:
        tt_models.config_from_hf(config)
    text = str(error.value)
    assert text.startswith("config.json")
    assert text.isprintable()
    assert len(text) < 2000
    return text


@pytest.mark.parametrize("key", [key for key in LIMITS if not key.endswith("token_id")])
@pytest.mark.parametrize("value", [-1, 10**30, 10**400, math.nan, math.inf, "12", "x" * 10**6, True, [[]], DEEP])
def test_a_value_that_no_model_has_is_refused_by_its_key(key, value):
    families = [name for name, family in FAMILIES.items() if key in family.config.__dataclass_fields__]
    assert families
    for family in families:
        refused({"model_type": family} | TINY | {key: value}, rf"{key}.*; correct it|{key}.*\(write 12\)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**8),
        ("num_hidden_layers", 10**7),
        ("vocab_size", 10**9),
        ("hidden_size", 2**40),
        ("num_attention_heads", 2**40),
        ("head_dim", 2**40),
        ("max_position_embeddings", 2**40),
        ("intermediate_size", 2**40),
    ],
)
def test_absurd_sizes_are_answered_with_what_is_expected_and_the_cure(key, value):
    text = refused(LLAMA | {key: value}, f"{key} is out of range, got {value}: expected 1 to .*largest published")
    assert text.endswith("; correct it, or use the model's own config.json")


def test_absurd_numbers_of_experts_and_windows_are_refused():
    refused({"model_type": "qwen3_moe"} | TINY | {"num_experts": 10**6}, "num_experts is out of range, got 1000000")
    refused({"model_type": "mixtral"} | TINY | {"num_local_experts": 10**6}, "num_local_experts is out of range")
    many = {"num_experts": 2**14, "num_hidden_layers": 1024}
    refused({"model_type": "qwen3_moe"} | TINY | many, "16384 experts in each of num_hidden_layers 1024 are more than")
    refused({"model_type": "mistral"} | TINY | {"sliding_window": 2**40}, "sliding_window is out of range")


def test_every_published_size_is_far_below_the_limits():
    for name in tt_models.list_models():
        config = tt_models.get_config(name)
        for key, (_, most, _) in LIMITS.items():
            value = getattr(config, key, None)
            if isinstance(value, int) and not key.endswith("token_id") and most > 1:
                assert value * 10 <= most, (name, key)


def test_the_deepest_model_that_is_accepted_is_built_in_time():
    config = tt_models.config_from_hf(LLAMA | {"num_hidden_layers": 1024})
    assert len(tt_models.build(config, device="meta").model.layers) == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, r"hidden_size must be int, got '32' \(write 32\)"),
        ({"hidden_size": 32.0}, r"hidden_size must be int, got 32.0 \(write 32\)"),
        ({"rope_theta": "1e4"}, r"rope_theta must be float, got '1e4' \(write 10000\)"),
        ({"tie_word_embeddings": "true"}, r"tie_word_embeddings must be bool, got 'true' \(write true\)"),
        ({"head_dim": 7}, "head_dim 7: rope rotates pairs.*expected an even number"),
        ({"initializer_range": -1}, "initializer_range must not be negative, got -1"),
        ({"initializer_range": math.nan}, "initializer_range is out of range, got nan"),
        ({"rope_theta": 1}, "rope_theta is out of range, got 1: expected 2 to"),
        ({"rope_scaling": DEEP}, "rope_scaling"),
        ({"rope_parameters": DEEP}, "rope_scaling|rope_parameters"),
        ({"rope_scaling": {"type": DEEP}}, "rope_type must be a name"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type must be a name, got .'yarn'.: known are"),
        ({"rope_scaling": YARN | {"factor": math.inf}}, "factor is out of range, got inf"),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "factor is out of range, got a number of"),
        ({"rope_scaling": YARN | {"beta_fast": 1e-300}}, "beta_fast is out of range, got 1e-300"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 2**40}},
            "original_max_position_embeddings is out",
        ),
        ({"rope_scaling": YARN | {f"k{i}": 1 for i in range(9999)}}, "does not know k0, .* and 9,994 more"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor 1.0 is equal to high_freq_factor 1.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "needs a rotated part of more than 2"),
        ({"rope_scaling": {"type": "\x1b]0;x\x07"}}, r"rope_type '\\x1b"),
        ({"hidden_act": "x" * 10**6}, "hidden_act .*1,000,000 characters"),
        ({"eos_token_id": 10**30}, "eos_token_id is out of range"),
        ({"eos_token_id": [2, -(10**12)]}, "eos_token_id must be positive|eos_token_id is out of range"),
        ({"eos_token_id": list(range(10**6))}, "eos_token_id has 1,000,000 elements"),
        ({"quantization_config": "\x1b[2J" * 99}, r"quantization_config: '\\x1b"),
        ({"quantization_config": DEEP | {"quant_method": DEEP}}, "quantization_config: an object"),
        ({"quantization_config": [[[1]]]}, "quantization_config: a list"),
        ({"n_embd": DEEP}, "n_embd = an object of 1 is not supported"),
        ({"\x1b]0;x\x07": 1}, r"unknown key '\\x1b\]0;x\\x07'"),
        ({"k" * 10**6: 1}, "has the key .*1,000,000 characters.*, expected at most"),
        ({f"k{i}": 1 for i in range(100_000)}, "has 100,0.. keys, expected at most 4,096"),
        ({f"k{i}": 1 for i in range(3000)}, "and 2,995 more; remove a key"),
        ({"model_type": "x" * 10**6}, "model_type .*1,000,000 characters"),
        ({"model_type": "lama\x1b", "architectures": ["\x1b[2J"]}, r"'lama\\x1b': did you mean 'llama'"),
        ({"model_type": "xyz", "architectures": DEEP}, "architectures an object of 1"),
        ({"model_type": "xyz", "text_config": {"model_type": ["llama"]}}, "supported: llama"),
    ],
)
def test_odd_values_are_refused_in_one_printable_line(change, message):
    refused(LLAMA | change, message)


@pytest.mark.parametrize(
    "kinds", [["full_attention"] * 10**7, ["\x1b"] * 10**5, "full_attention", [["full_attention"]]]
)
def test_layer_types_of_any_length_are_refused(kinds):
    refused({"model_type": "gemma2"} | TINY | {"layer_types": kinds}, "layer_types")


def test_what_has_no_effect_may_be_anything():
    odd = {
        "torch_dtype": DEEP,
        "auto_map": {"AutoModel": "evil.Model"},
        "architectures": 5,
        "_x": "\x1b",
        "use_cache": [],
    }
    assert tt_models.config_from_hf(LLAMA | odd) == tt_models.config_from_hf(LLAMA)


def test_fields_given_by_hand_are_checked_alike():
    with pytest.raises(ValueError, match=r"hidden_size must be int, got '32' \(write 32\)"):
        tt_models.LlamaConfig(hidden_size="32")
    with pytest.raises(ValueError, match="num_hidden_layers is out of range, got 100000000: expected 1 to 1024"):
        tt_models.LlamaConfig(num_hidden_layers=10**8)
    with pytest.raises(ValueError, match="no model is named 5"):
        tt_models.get_config(5)


def test_rope_of_a_published_config_with_another_head_is_refused_when_it_is_read():
    factors = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
    refused({"model_type": "phi3"} | TINY | {"rope_scaling": factors}, "short_factor has 3 numbers, 4 are needed")


# ---- generation ------------------------------------------------------------------------------------------------------

NOT_NUMBERS = ["0.5", [1], None, True]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 1e-40, 1e300, 10**400, *NOT_NUMBERS]),
        ("top_p", [0, 2, -1, math.nan, "0.9", [1]]),
        ("min_p", [-1, 2, math.nan, "0.9"]),
        ("top_k", [0, -1, 1.5, "5", [1]]),
        ("repetition_penalty", [0, -1, math.nan, math.inf, 1e300, *NOT_NUMBERS]),
        ("max_new_tokens", [0, -1, 10**12, 10**400, 1.5, "5", None]),
        ("seed", [-1, 2**64, 10**400, 1.5, "0", [0, 1], [None]]),
        ("eos_ids", [10**9, -1, 61, [2, 10**30], 1.5, "2", [None], [1.5], torch.tensor([99])]),
        ("pad_id", [10**30, 1.5, "0"]),
    ],
)
def test_settings_of_generation_that_mean_nothing_are_refused_by_name(name, values):
    model = tt_models.build(tt_models.config_from_hf(LLAMA))
    for value in values:
        for function in (tt_models.generate, tt_models.stream):
            if name == "pad_id" and function is tt_models.stream:
                continue
            given = {"max_new_tokens": 2} | {name: value}
            with pytest.raises(ValueError, match=f"{name}.*(must|is not a token|exceed)") as error:
                function(model, [[1, 2]], **given)
            assert str(error.value).isprintable()
            assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "prompts", ["abc", ["abc"], 5, [], [[]], [5], [["a"]], [[1.5]], [[1, None]], [[10**30]], [[True]], [[[1]]], None]
)
def test_prompts_that_are_no_lists_of_ids_are_refused(prompts):
    model = tt_models.build(tt_models.config_from_hf(LLAMA))
    with pytest.raises(ValueError, match="prompt"):
        tt_models.generate(model, prompts, max_new_tokens=2)


def test_a_length_that_no_memory_holds_is_refused_before_it_is_reserved():
    config = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    model = tt_models.build(tt_models.config_from_hf(config))
    with pytest.raises(ValueError, match="KVCache.* needs .* GB, .* has .*; lower max_seq_len"):
        tt_models.generate(model, [[1, 2]], max_new_tokens=2**31)


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built():
    config = tt_models.config_from_hf(LLAMA | {"hidden_size": 2**17, "num_hidden_layers": 200, "vocab_size": 10**6})
    assert tt_models.build(config, device="meta").model.layers
    with pytest.raises(ValueError, match=r"a llama of .* parameters as float32 needs .* (GB|TB), this machine has"):
        tt_models.build(config)


def test_misuse_of_the_library_is_answered_with_what_is_expected():
    with pytest.raises(ValueError, match="device must be a name such as 'cpu'"):
        tt_models.build("smollm2_135m", device="cud")
    with pytest.raises(ValueError, match="config_to_hf takes a config"):
        tt_models.config_to_hf(LLAMA)
    model = tt_models.build(tt_models.config_from_hf(LLAMA), device="meta")
    with pytest.raises(ValueError, match="on the meta device, without weights: load them"):
        tt_models.generate(model, [[1]], max_new_tokens=1)


def test_json_of_any_kind_is_answered():
    for value in (json.loads("[" * 500 + "]" * 500), "x", 5, None):
        with pytest.raises(ValueError, match="config.json must be a mapping"):
            tt_models.config_from_hf(value)
