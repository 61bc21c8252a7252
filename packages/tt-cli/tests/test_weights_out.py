"""``tt export``, ``convert``, ``verify`` and ``upload``, on a model made here."""

import json

import pytest
import torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "initializer_range": 0.05, "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory):
    """A Llama without a tokenizer."""
    import tt_ckpt
    import tt_models

    folder = tmp_path_factory.mktemp("bare") / "model"
    torch.manual_seed(0)
    tt_ckpt.save_hf(tt_models.build(tt_models.config_from_hf(CONFIG)), folder, config=CONFIG)
    return folder


def test_there_and_back_is_the_same_to_the_byte(tt, bare_model, tmp_path):
    away = tt("convert", str(bare_model), str(tmp_path / "meta"), "--to", "meta", "--json")
    assert away.code == 0
    assert away.json["verified"]
    assert (tmp_path / "meta" / "params.json").exists()
    back = tt("convert", str(tmp_path / "meta"), str(tmp_path / "hf"), "--to", "hf", "--allow-pickle")
    assert back.code == 0
    assert back.out.strip() == str(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (bare_model / "model.safetensors").read_bytes()


def test_pickles_need_an_option_on_the_command_line(tt, bare_model, tmp_path):
    tt("convert", str(bare_model), str(tmp_path / "meta"), "--to", "meta")
    refused = tt("convert", str(tmp_path / "meta"), str(tmp_path / "hf"), "--to", "hf")
    assert refused.code == 2
    assert "allow-pickle" in refused.err
    assert not (tmp_path / "hf").exists()


def test_a_dry_run_writes_nothing(tt, bare_model, tmp_path):
    for words in (["convert", str(bare_model), str(tmp_path / "x"), "--to", "torchtune"],
                  ["export", str(bare_model), "-o", str(tmp_path / "x")],
                  ["merge", str(bare_model), "-o", str(tmp_path / "x")]):  # fmt: skip
        assert tt(*words, "--dry-run").code == 0
        assert not (tmp_path / "x").exists()


def test_upload_shows_what_it_would_send(tt, bare_model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = tt("upload", str(bare_model), "me/model", "--dry-run", "--json")
    assert answer.code == 0
    assert {"README.md", "config.json", "model.safetensors"} <= set(answer.json["files"])


def test_a_wrong_format_is_answered_with_the_right_one(tt, bare_model, tmp_path):
    answer = tt("export", str(bare_model), "-o", str(tmp_path / "x"), "--to", "olama")
    assert answer.code == 2
    assert "did you mean 'ollama'" in answer.err
    answer = tt("convert", str(bare_model), str(tmp_path / "x"), "--to", "mtea")
    assert answer.code == 2
    assert "meta" in answer.err


def test_a_certificate_is_json(tt, bare_model, tmp_path):
    pytest.importorskip("transformers")
    answer = tt("verify", str(bare_model), "--json", "-o", str(tmp_path / "certificate.json"))
    assert answer.code == 0, answer.err
    assert answer.json["passed"]
    assert json.loads((tmp_path / "certificate.json").read_text())["errors"] == answer.json["errors"]
    words = tt("verify", str(bare_model))
    assert "equal within rounding" in words.out
    assert "transformers" in words.out.splitlines()[0]
    assert words.err == ""
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    refused = tt("verify", str(bare_model), "-o", str(tmp_path / "notes.json"))
    assert (refused.code, "notes.json exists and is not a certificate" in refused.err) == (2, True)
    assert tt("verify", str(bare_model), "-o", str(tmp_path / "certificate.json")).code == 0  # an older one


def test_a_model_that_is_not_equal_is_shown_with_its_limits_and_exits_with_1(tt, monkeypatch):
    certificate = {
        "model": "m",
        "passed": False,
        "errors": {"logits": 2e-3, "greedy_differences": 3, "gradients": "inf"},
    }
    certificate |= {"reference_errors": {"logits": 1e-6}, "limits": {"logits": 8e-6, "greedy_differences": 0}}
    certificate["limits"]["gradients"] = 1e-5
    certificate |= {"worst_gradient": "model.norm.weight", "versions": {"torch": "2"}}
    monkeypatch.setattr("tt_train.models.verify.verify", lambda model, seed: certificate)
    answer = tt("verify", "m")
    assert answer.code == 1
    assert [line.split() for line in answer.out.splitlines()[1:4]] == [
        ["logits", "2.0e-03", "1.0e-06", "8.0e-06"],
        ["greedy_differences", "3", "0"],
        ["gradients", "inf", "1.0e-05"],
    ]
    assert "least accurate gradient: model.norm.weight" in answer.out
    assert "m: NOT equal (torch 2)" in answer.out


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_the_output_is_a_word_or_an_option_but_not_both(tt, model_dir, tmp_path, verb):
    one, other = tmp_path / "one", tmp_path / "other"
    assert tt(verb, str(model_dir), str(one)).out.strip() == str(one)
    assert tt(verb, str(model_dir), "-o", str(other)).out.strip() == str(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for words, part in [([], "name the directory to write"), (["a", "-o", "b"], "two outputs, 'a' and -o b")]:
        answer = tt(verb, str(model_dir), *words)
        assert answer.code == 2
        assert part in answer.err


def test_the_format_to_convert_to_is_hugging_faces_unless_said(tt, bare_model, tmp_path):
    tt("convert", str(bare_model), str(tmp_path / "meta"), "--to", "meta")
    answer = tt("convert", str(tmp_path / "meta"), str(tmp_path / "out"), "--allow-pickle")
    assert answer.code == 0, answer.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_gguf_file_is_converted_and_a_missing_one_named(tt, tmp_path):
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8, "head_count": 1}
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    ones = np.ones((8, 8), np.float32)
    parts = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    for name in ("token_embd", *(f"blk.0.{part}" for part in parts)):
        writer.add_tensor(f"{name}.weight", ones)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", ones[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    answer = tt("convert", str(tmp_path / "model.gguf"), str(tmp_path / "hf"), "--dtype", "fp16")
    assert answer.code == 0, answer.err
    assert "float16) from gguf" in answer.err
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float16"
    answer = tt("convert", str(tmp_path / "modle.gguf"), str(tmp_path / "hf2"))
    assert answer.code == 2
    assert "no such file; did you mean" in answer.err
