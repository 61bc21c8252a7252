import json
from pathlib import Path

import pytest
import torch

import tt_ckpt
from tt_ckpt.formats.meta_params import config_from_params, feed_forward_params, params_from_config
from tt_ckpt.safetensors_file import TensorSpec

# params.json as published, and what the Hugging Face repositories of the same models say
LLAMA2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA2_70B = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
              "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip
LLAMA3_8B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
             "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0}  # fmt: skip
LLAMA31_8B = LLAMA3_8B | {"use_scaled_rope": True}
LLAMA32_1B = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
              "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 500000.0,
              "use_scaled_rope": True}  # fmt: skip
MISTRAL_7B = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
              "norm_eps": 1e-5, "sliding_window": 4096, "vocab_size": 32000}  # fmt: skip
CODELLAMA = LLAMA2_7B | {"rope_theta": 1000000.0}
SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CASES = {
    "llama2_7b": (LLAMA2_7B, 32000, 11008, False, {"num_key_value_heads": 32, "rope_theta": 10000.0,
                                                   "max_position_embeddings": 4096, "model_type": "llama"}),
    "llama2_70b": (LLAMA2_70B, 32000, 28672, False, {"num_key_value_heads": 8, "num_hidden_layers": 80}),
    "llama3_8b": (LLAMA3_8B, 128256, 14336, False, {"rope_theta": 500000.0, "max_position_embeddings": 8192,
                                                    "bos_token_id": 128000, "eos_token_id": 128001}),
    "llama3_1_8b": (LLAMA31_8B, 128256, 14336, False, {"max_position_embeddings": 131072,
                                                       "rope_scaling": {**SCALING, "factor": 8.0}}),
    "llama3_2_1b": (LLAMA32_1B, 128256, 8192, True, {"tie_word_embeddings": True,
                                                     "rope_scaling": {**SCALING, "factor": 32.0}}),
    "mistral_7b": (MISTRAL_7B, 32000, 14336, False, {"model_type": "mistral", "sliding_window": 4096, "head_dim": 128,
                                                     "architectures": ["MistralForCausalLM"]}),
    "codellama_7b": (CODELLAMA, 32016, 11008, False, {"rope_theta": 1000000.0, "max_position_embeddings": 16384}),
}  # fmt: skip


def specs(vocab, hidden, inner):
    return {
        "model.embed_tokens.weight": TensorSpec(dtype=torch.bfloat16, shape=(vocab, hidden)),
        "model.layers.0.mlp.gate_proj.weight": TensorSpec(dtype=torch.bfloat16, shape=(inner, hidden)),
    }


@pytest.mark.parametrize("name", CASES)
def test_published_params_give_the_published_config(name):
    params, vocab, inner, tied, expected = CASES[name]
    config = config_from_params(params, specs(vocab, params["dim"], inner), tied, Path("x/consolidated.00.pth"))
    assert config["hidden_size"] == params["dim"]
    assert config["intermediate_size"] == inner
    assert config["vocab_size"] == vocab
    assert config["torch_dtype"] == "bfloat16"
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("name", CASES)
def test_params_written_from_the_config_say_the_same(name):
    params, vocab, inner, tied, _ = CASES[name]
    config = config_from_params(params, specs(vocab, params["dim"], inner), tied, Path("x/consolidated.00.pth"))
    written = params_from_config(config)
    assert written["vocab_size"] == vocab
    same = params.keys() - {"vocab_size", "multiple_of", "ffn_dim_multiplier"}
    assert {key: written[key] for key in same} == {key: params[key] for key in same}
    assert config_from_params(written, specs(vocab, params["dim"], inner), tied, Path("x/y.pth")) == config


MATHS = {
    "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "vocab_size",
}  # fmt: skip
OWN = {"llama": {"attention_bias", "mlp_bias"}, "mistral": {"sliding_window"}}


@pytest.mark.parametrize("name", [*CASES, "mistral_7b_v0_3"])
def test_no_number_is_left_to_the_readers_default(name):
    params, vocab, inner, tied, _ = CASES.get(name, CASES["mistral_7b"])
    if name == "mistral_7b_v0_3":  # published without a window: transformers' default would be one of 4096
        params = {key: value for key, value in params.items() if key != "sliding_window"} | {"rope_theta": 1e6}
    config = config_from_params(params, specs(vocab, params["dim"], inner), tied, Path("x/consolidated.00.pth"))
    assert MATHS | OWN[config["model_type"]] <= config.keys()
    if config["model_type"] == "mistral":
        assert config["sliding_window"] == params.get("sliding_window")
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoConfig.for_model(**config)
    assert getattr(read, "sliding_window", None) == config.get("sliding_window")
    assert read.rope_parameters["rope_theta"] == config["rope_theta"]


def test_both_generations_of_configs_are_read(config):
    old = config(rope_theta=5e5, rope_scaling={**SCALING, "factor": 8.0})
    new = config(rope_parameters={**SCALING, "factor": 8.0, "rope_theta": 5e5})
    del new["rope_theta"]
    assert params_from_config(old) == params_from_config(new)
    assert params_from_config(new)["rope_theta"] == 5e5
    assert params_from_config(new)["rope_scaling_factor"] == 8.0


@pytest.mark.parametrize(
    ("hidden", "inner"), [(4096, 11008), (8192, 28672), (2048, 8192), (3072, 8192), (32, 48), (5, 7)]
)
def test_the_feed_forward_rule_gives_the_size_back(hidden, inner):
    params = feed_forward_params(hidden, inner)
    size = int(8 * hidden / 3)
    if "ffn_dim_multiplier" in params:
        size = int(params["ffn_dim_multiplier"] * size)
    assert -(-size // params["multiple_of"]) * params["multiple_of"] == inner


@pytest.fixture
def meta_dir(model_dir, tmp_path):
    """A Meta directory as Meta publishes one: no config.json."""
    tt_ckpt.convert(model_dir(vocab_size=64), tmp_path / "meta", "meta", num_parts=2)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / "meta" / name).unlink()
    return tmp_path / "meta"


def test_a_directory_without_config_json_gets_one(meta_dir, model_dir, tmp_path, tiny, equal_models):
    tt_ckpt.convert(meta_dir, tmp_path / "back", "hf", allow_pickle=True)
    config, original = tt_ckpt.read_config(tmp_path / "back"), tt_ckpt.read_config(tmp_path / "source")
    shared = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rope_theta",
              "vocab_size",
              "rms_norm_eps", "tie_word_embeddings", "model_type", "architectures")  # fmt: skip
    assert {key: config[key] for key in shared} == {key: original[key] for key in shared}
    model = tiny(5, vocab_size=64)
    tt_ckpt.load_weights(model, tmp_path / "back")
    assert equal_models(model, tiny(1, vocab_size=64))


def test_equal_output_and_embedding_mean_tied(model_dir, tmp_path):
    source = model_dir(tie_word_embeddings=True)
    tt_ckpt.convert(source, tmp_path / "meta", "meta")
    (tmp_path / "meta" / "config.json").unlink()
    assert "output.weight" in torch.load(tmp_path / "meta" / "consolidated.00.pth")
    tt_ckpt.convert(tmp_path / "meta", tmp_path / "back", "hf", allow_pickle=True)
    assert tt_ckpt.read_config(tmp_path / "back")["tie_word_embeddings"] is True
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("change", "message"), [
    (lambda params: params.pop("dim"), "params.json: dim: expected a whole number above 0, found None"),
    (lambda params: params.update(n_heads="4"), "n_heads: expected a whole number above 0, found '4'"),
    (lambda params: params.update(n_heads=5), "query rows, not 30|do not divide"),
    (lambda params: params.update(n_layers=-1), "n_layers: expected a whole number above 0, found -1"),
    (lambda params: params.update(dim=33), "parts"),
    (lambda params: params.update(rope_thetta=1e6), "rope_thetta .* is not known; did you mean rope_theta"),
    (lambda params: params.update(moe={"num_experts": 8}), "moe .* is not known; give config=DIR"),
    (lambda params: params.update(quantization_args={"group_size": 32}), "quantization_args"),
    (lambda params: params.update(hidden_dim=64), "hidden_dim 64 does not fit w1 with 48 rows"),
])  # fmt: skip
def test_wrong_params_are_explained(meta_dir, tmp_path, change, message):
    params = json.loads((meta_dir / "params.json").read_text())
    change(params)
    (meta_dir / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=message):
        tt_ckpt.convert(meta_dir, tmp_path / "back", "hf", allow_pickle=True)


def test_parts_that_do_not_belong_together_are_refused(meta_dir, tmp_path):
    part = torch.load(meta_dir / "consolidated.01.pth")
    part.pop("norm.weight")
    torch.save(part, meta_dir / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated.01.pth: norm.weight is not in every part"):
        tt_ckpt.convert(meta_dir, tmp_path / "back", "hf", allow_pickle=True)


def test_a_missing_part_is_noticed(meta_dir, tmp_path):
    (meta_dir / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="parts"):
        tt_ckpt.convert(meta_dir, tmp_path / "back", "hf", allow_pickle=True)


def test_a_missing_part_is_noticed_where_the_embedding_is_split_by_rows(model_dir, tmp_path):
    tt_ckpt.convert(model_dir(vocab_size=100_000), tmp_path / "meta", "meta", num_parts=2)
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="1 parts with 16 query rows, not 32; parts missing"):
        tt_ckpt.convert(tmp_path / "meta", tmp_path / "back", "hf", allow_pickle=True)


def test_neither_params_nor_config_is_explained(meta_dir, tmp_path):
    (meta_dir / "params.json").unlink()
    with pytest.raises(ValueError, match=r"neither params.json nor config.json states the sizes; give config=DIR"):
        tt_ckpt.convert(meta_dir, tmp_path / "back", "hf", allow_pickle=True)


def test_the_same_part_twice_is_noticed(model_dir, tmp_path):
    tt_ckpt.convert(model_dir(vocab_size=64), tmp_path / "meta", "meta", num_parts=2)
    part = (tmp_path / "meta" / "consolidated.00.pth").read_bytes()
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    (tmp_path / "meta" / "consolidated.01.pth").write_bytes(part)
    with pytest.raises(ValueError, match=r"consolidated.01.pth: contains the same part as consolidated.00.pth"):
        tt_ckpt.convert(tmp_path / "meta", tmp_path / "out", "hf", allow_pickle=True)
