"""Keys of config.json that are not fields: passed over, taken if they say what is computed, else refused."""

import pytest

import tt_models

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61}


HARMLESS = """_model_name_or_path _anything unsloth_version lora_alpha learning_rate per_device_train_batch_size
nemo_version type_vocab_size draft_model_name_or_path image_token_id
vision_start_token_id summary_type z_loss_coef attn_implementation tf_legacy_loss"""


@pytest.mark.parametrize("key", HARMLESS.split())
def test_provenance_and_training_settings_are_passed_over(key):
    assert tt_models.config_from_hf(LLAMA | {key: "2e-5"}) == tt_models.config_from_hf(LLAMA)


@pytest.mark.parametrize(
    ("model_type", "agrees", "contradicts"),
    [
        ("llama", {"n_embd": 32}, {"n_embd": 64}),
        ("llama", {"activation": "swiglu"}, {"activation": "gelu"}),
        ("llama", {"use_qk_norm": False}, {"use_qk_norm": True}),
        ("llama", {"num_experts": 0}, {"num_experts": 4}),
        ("llama", {"sliding_window": 2048}, {"sliding_window": 64}),
        ("llama", {"rope_base": 10000}, {"rope_base": 500000}),
        ("llama", {"causal": True}, {"causal": False}),
        ("llama", {"layer_types": ["full_attention"] * 2}, {"layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {"no_rope_layers": [1, 1]}, {"no_rope_layers": [1, 0]}),
        ("llama", {"weight_bits": None}, {"weight_bits": 1}),
        ("llama", {"head_size": 8}, {"head_size": 16}),
        ("mistral", {"use_sliding_window": True}, {"use_sliding_window": False}),
        ("mistral", {"sliding_window": 64, "sliding_window_size": 64}, {"sliding_window_size": 64}),
        ("qwen2", {"qkv_bias": True}, {"qkv_bias": False}),
        ("qwen3", {"use_qk_norm": True, "qkv_bias": False}, {"use_qk_norm": False}),
        ("gpt_oss", {"initial_context_length": 4096}, {"initial_context_length": 8192}),
    ],
)
def test_a_key_that_is_not_a_field_must_say_what_is_computed(model_type, agrees, contradicts):
    config = LLAMA | {"model_type": model_type, "num_key_value_heads": 2, "head_dim": 8}
    tt_models.config_from_hf(config | agrees)
    key, value = next(iter(contradicts.items()))
    with pytest.raises(ValueError, match=f"{key} = .* is not supported, {model_type} is computed with.*remove a key"):
        tt_models.config_from_hf(config | {key: value})


def test_an_unknown_feature_may_be_switched_off_and_not_on_or_mistyped():
    config = tt_models.config_from_hf(LLAMA)
    for value in (None, False, 0, 0.0, "", [], {}):
        assert tt_models.config_from_hf(LLAMA | {"qk_clip": value}) == config
    for value in (True, 1, "x", [0], {"a": 0}):
        with pytest.raises(ValueError, match="unknown key 'qk_clip'"):
            tt_models.config_from_hf(LLAMA | {"qk_clip": value})
    with pytest.raises(ValueError, match="unknown key 'tie_word_embedding' with value False, nearest known key"):
        tt_models.config_from_hf(LLAMA | {"tie_word_embedding": False})


def test_settings_of_bitsandbytes_that_quantize_nothing_are_passed_over():
    unused = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    assert tt_models.config_from_hf(LLAMA | {"quantization_config": unused}) == tt_models.config_from_hf(LLAMA)
    for settings in (
        unused | {"load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"group_size": 64, "bits": 4},
    ):
        with pytest.raises(ValueError, match="only unquantized weights are read: use the original model"):
            tt_models.config_from_hf(LLAMA | {"quantization_config": settings})


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_context_length_comes_from_the_rope_or_beside_it_or_is_the_longest(kind):
    rope = {"rope_type": kind, "factor": 2.0} | (
        {"low_freq_factor": 1, "high_freq_factor": 4} if kind == "llama3" else {}
    )
    length = "original_max_position_embeddings"

    def read(config):
        return tt_models.config_from_hf(LLAMA | {"max_position_embeddings": 64} | config).rope_scaling[length]

    assert read({"rope_scaling": rope | {length: 16}}) == 16
    assert read({"rope_scaling": rope, length: 32}) == 32
    assert read({"rope_scaling": rope}) == 64
    with pytest.raises(ValueError, match="original_max_position_embeddings is given twice and differently: 32 and 16"):
        read({"rope_scaling": rope | {length: 16}, length: 32})


def test_a_number_of_a_rope_that_its_reference_does_not_read_is_passed_over_if_it_is_neutral():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    expected = tt_models.config_from_hf(LLAMA | {"rope_scaling": yarn})
    for extra in ({"attn_factor": 0.88}, {"extrapolation_factor": 1.0}, {"finetuned": True}):
        assert tt_models.config_from_hf(LLAMA | {"rope_scaling": yarn | extra}) == expected
    with pytest.raises(ValueError, match="does not know extrapolation_factor"):
        tt_models.config_from_hf(LLAMA | {"rope_scaling": yarn | {"extrapolation_factor": 2.0}})
    plain = {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 16}
    assert tt_models.config_from_hf(LLAMA | {"rope_scaling": plain}).rope_scaling is None


def test_a_window_that_is_used_and_not_given_is_that_of_the_reference():
    transformers = pytest.importorskip("transformers")
    for model_type in ("qwen2", "qwen3", "qwen3_moe"):
        config = {"model_type": model_type, "use_sliding_window": True, "max_window_layers": 0}
        expected = transformers.AutoConfig.for_model(**config).sliding_window
        assert set(tt_models.config_from_hf(config).layer_windows) == {expected} == {4096}
        assert set(tt_models.config_from_hf(config | {"sliding_window": None}).layer_windows) == {None}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gemma_computes_hidden_activation_whatever_hidden_act_beside_it_says(model_type):
    config = LLAMA | {"model_type": model_type, "head_dim": 8, "num_key_value_heads": 2}
    expected = tt_models.config_from_hf(config)
    for stray in ({"hidden_act": "gelu"}, {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}):
        assert tt_models.config_from_hf(config | stray) == expected
    assert tt_models.config_from_hf(config | {"hidden_act": "gelu", "hidden_activation": "silu"}).hidden_act == "silu"
    with pytest.raises(ValueError, match="hidden_act = 'silu'.*set hidden_activation"):
        tt_models.config_from_hf(config | {"hidden_act": "silu"})


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_layers_with_a_window_that_is_switched_off_are_refused(model_type):
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    config = LLAMA | {"model_type": model_type, "num_key_value_heads": 2, "pad_token_id": None} | kinds
    assert tt_models.config_from_hf(config | {"use_sliding_window": True}).layer_windows == (None, 8)
    with pytest.raises(ValueError, match="use_sliding_window is false"):
        tt_models.config_from_hf(config)
