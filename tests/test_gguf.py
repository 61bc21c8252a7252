"""GGUF files of every family, read and written: tt_models and transformers compute the same logits with them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import tt_ckpt
import tt_models
from tt_ckpt.formats.gguf.plan import plan_model
from tt_ckpt.formats.gguf.writer import write_gguf
from tt_ckpt.hf.save import stored_weights

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SOURCE = Path(__file__).parents[1] / "packages" / "tt-ckpt" / "tests" / "test_gguf.py"
spec = importlib.util.spec_from_file_location("gguf_of_tt_ckpt", SOURCE)
assert spec is not None
assert spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.mark.parametrize("case", made.CASES)
def test_a_converted_file_loads_and_computes_what_its_model_does(tmp_path, case):
    arch, config, extra = made.CASES[case]
    model = made.small(config)
    tt_ckpt.convert(made.write_gguf(tmp_path / "model.gguf", model, arch, extra=extra), tmp_path / "hf")
    ours = tt_models.build(tt_models.config_from_hf(tt_ckpt.read_config(tmp_path / "hf")), device="meta")
    tt_ckpt.load_weights(ours, tmp_path / "hf")
    expected = made.logits(model)
    torch.manual_seed(1)
    with torch.no_grad():
        found = ours(torch.randint(3, 96, (2, 40)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


ROWS = 300  # embeddings: bytes, some tokens, and padding


def write_tokenizer(folder):
    """Pieces with bytes, as Llama 2 has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    body = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "byte_fallback": True,
                  "fuse_unk": True, "unk_token": "<unk>", "merges": [["a", "b"], ["\u2581", "ab"]]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(body))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def written(tmp_path, case, kind, change=None):
    """A small model of transformers, and the GGUF file that we write of it."""
    _, config, _ = made.CASES[case]
    config = type(config).from_dict({**config.to_dict(), "vocab_size": ROWS})
    model = made.small(config)
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    stated = tt_models.config_to_hf(tt_models.config_from_hf(tt_ckpt.read_config(tmp_path / "hf")))
    plan = plan_model(stored_weights(tmp_path / "hf", {**stated, **(change or {})}), tmp_path / "hf", kind=kind)
    return model, write_gguf(plan, tmp_path / "model.gguf")


@pytest.mark.parametrize("case", made.CASES)
def test_a_written_file_is_read_back_as_the_model_that_it_was_written_from(tmp_path, case):
    model, report = written(tmp_path, case, "F32")
    assert report.error == 0
    tt_ckpt.convert(tmp_path / "model.gguf", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    theirs = model.state_dict()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.0, atol=2**-22 if "norm" in name else 0.0)
    torch.testing.assert_close(made.logits(again), made.logits(model), rtol=1e-4, atol=1e-4)


# transformers reads no other architectures, or reads them without their windows, soft caps and head sizes
@pytest.mark.parametrize("case", ["llama", "llama tied, wide heads", "qwen2"])
def test_transformers_reads_a_written_file_with_the_same_logits(tmp_path, case):
    model, _ = written(tmp_path, case, "F32")
    theirs = made.as_transformers_reads(tmp_path / "model.gguf")
    torch.testing.assert_close(made.logits(theirs), made.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "most"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.008), ("Q4_0", 0.13)])
def test_each_type_is_written_within_its_error_and_as_the_gguf_package_quantizes(tmp_path, kind, most):
    model, report = written(tmp_path, "llama", kind)
    assert 0 < report.error < most
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == kind
    assert found.data.tobytes() == gguf.quantize(weight, found.tensor_type).tobytes()
    assert tensors["token_embd.weight"].tensor_type.name == {"Q4_0": "Q8_0"}.get(kind, kind)
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' cannot be expressed"),
        ("gemma 2", {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar 17"),
        ("gemma 3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
        ("qwen3 yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0,
                                         "original_max_position_embeddings": 64}}, "rope_scaling.mscale 2.0"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ("llama", {"new_setting": 2}, "new_setting 2"),
        ("llama", {"model_type": "gpt_oss"}, "model_type 'gpt_oss' is not written as GGUF"),
    ],
)  # fmt: skip
def test_a_setting_that_llama_cpp_would_not_follow_is_refused_by_name(tmp_path, case, change, words):
    with pytest.raises(ValueError, match=words):
        written(tmp_path, case, "F32", change)
    assert not (tmp_path / "model.gguf").exists()


def test_a_window_that_llama_cpp_ignores_is_told(tmp_path):
    assert "beyond 16 tokens it attends to all" in written(tmp_path, "mistral", "F16")[1].notes[0]
