"""Exports as GGUF: of a model, a run with an adapter, an adapter alone, and beside a Modelfile."""

import json
import re
import shutil

import pytest
import torch

import tt_ckpt
import tt_peft
import tt_train
from tt_train import ConfigError
from tt_train.models.export import export
from tt_train.models.servers import adapter_commands, adapter_warnings

gguf = pytest.importorskip("gguf")


@pytest.fixture
def adapter_of(model_dir, tmp_path):
    """``adapter_of(rank=...)``: a folder with a random adapter of the model."""

    def make(**settings):
        model, _ = tt_train.load(model_dir)
        torch.manual_seed(0)
        tt_peft.apply_lora_(model, tt_peft.LoRAConfig(**{"rank": 4, "target_modules": "all-linear", **settings}))
        with torch.no_grad():
            for parameter in tt_peft.adapter_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return tt_peft.save_adapter(model, tmp_path / "tuned", base_model=str(model_dir))

    return make


def logits(path):
    model, _ = tt_train.load(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 43)[None])


def test_a_merged_adapter_goes_into_a_file_that_computes_the_same(adapter_of, tmp_path):
    said = []
    adapter = adapter_of()
    done = export(adapter, tmp_path / "m.gguf", to="gguf", tell=said.append)
    assert (done["gguf"].type, done["gguf"].error, done["warnings"]) == ("F32", 0, [])
    tt_ckpt.convert(tmp_path / "m.gguf", tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(adapter), rtol=1e-4, atol=1e-5)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.name"].contents() == "tuned"
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()
    assert done["commands"][0] == f"llama-cli -m {tmp_path / 'm.gguf'} --jinja"


def test_an_adapter_that_needs_the_whole_model_is_merged_too(adapter_of, tmp_path):
    adapter = adapter_of(modules_to_save=("lm_head",), target_modules=("q_proj",), use_dora=True)
    export(adapter, tmp_path / "m.gguf", to="gguf", type="f32")
    tt_ckpt.convert(tmp_path / "m.gguf", tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(adapter), rtol=1e-4, atol=1e-5)


def test_the_card_of_the_model_gives_license_and_languages(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "hf")
    card = "---\nlicense: mit\nlanguage: [en, fr]\ntags: tuned\ndatasets: x\n---\n# Model\n"
    (tmp_path / "hf" / "README.md").write_text(card)
    export(tmp_path / "hf", tmp_path / "m.gguf", to="gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = [fields[f"general.{key}"].contents() for key in ("name", "license", "languages", "tags")]
    assert found == ["hf", "mit", ["en", "fr"], ["tuned"]]


def test_an_adapter_file_has_the_factors_and_the_scale(adapter_of, tmp_path):
    adapter = adapter_of(alpha=12, use_rslora=True)
    done = export(adapter, tmp_path / "a.gguf", to="gguf", adapter=True)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 12 * 2  # rsLoRA divides by the root of the rank
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7
    state, _ = tt_peft.adapter_files.folder.read_adapter_weights(adapter)
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], state["model.layers.1.mlp.up_proj.lora_A.weight"])
    assert "--lora" in done["commands"][1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, r"DoRA \(use_dora\)"),
        ({"modules_to_save": ("lm_head",), "target_modules": ("q_proj",)}, "modules_to_save"),
        ({"target_modules": ("embed_tokens", "q_proj")}, "not of a linear layer"),
    ],
)
def test_what_llama_cpp_does_not_load_of_an_adapter_is_refused_by_name(adapter_of, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        export(adapter_of(**settings), tmp_path / "a.gguf", to="gguf", adapter=True)
    assert not (tmp_path / "a.gguf").exists()


def test_what_vllm_refuses_of_an_adapter_is_a_warning_and_its_rank_one_that_vllm_knows(adapter_of, tmp_path):
    adapter = adapter_of(use_dora=True, rank=6)
    done = export(adapter, tmp_path / "out", adapter=True)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "vLLM refuses an adapter with DoRA" in done["warnings"][0]
    assert "--max-lora-rank 8 " in done["commands"][0]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": False, "r": 1000}))
    told = adapter_warnings(adapter, trained_on_nf4=True)
    assert "ranks up to 512, this adapter has 1000" in told[0]
    assert "4 bits" in told[1]
    assert "--max-lora-rank 320 " in adapter_commands(adapter, "hf", tmp_path, 257)[0]


def test_a_modelfile_beside_a_gguf_file_names_it(model_dir, tmp_path):
    done = export(model_dir, tmp_path / "out", to="ollama", type="q8_0")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert re.match(r"FROM \./model\.gguf\nTEMPLATE ", (tmp_path / "out" / "Modelfile").read_text())
    assert done["gguf"].types == {"F32": 5, "Q8_0": 16}
    assert gguf.GGUFReader(tmp_path / "out/model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "gguf", "type": "q8"}, "did you mean 'q8_0'"),
        ({"to": "hf", "type": "q8_0"}, "use --to gguf"),
        ({"to": "gguf", "dtype": torch.float16}, "--dtype is of a Hugging Face directory"),
        ({"to": "gguf"}, r"whose name ends in \.gguf, such as .*out\.gguf"),
        ({"to": "hf", "adapter": True}, "has no adapter"),
        ({"to": "ollama", "adapter": True}, "not with --to ollama"),
    ],
)
def test_a_wrong_option_says_what_to_use(model_dir, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        export(model_dir, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_what_cannot_be_expressed_and_writes_nothing(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tt_ckpt, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    assert export(model_dir, tmp_path / "m.gguf", to="gguf", dry_run=True)["gguf"] is None
    shutil.copytree(model_dir, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        export(tmp_path / "hf", tmp_path / "m.gguf", to="gguf", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_that_would_come_back_with_other_ids_is_refused(model_dir, tmp_path, monkeypatch):
    from tt_train.models import gguf as module

    def other(plan, config):
        files = tt_ckpt.formats.gguf.plan.read_back_tokenizer(plan, config)
        body = json.loads(files["tokenizer.json"]) | {"normalizer": {"type": "Lowercase"}}
        return {**files, "tokenizer.json": json.dumps(body)}

    monkeypatch.setattr(module, "read_back_tokenizer", other)
    with pytest.raises(ValueError, match="would give other ids for"):
        export(model_dir, tmp_path / "m.gguf", to="gguf")
