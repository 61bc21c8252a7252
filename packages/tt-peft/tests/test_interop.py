"""Adapters exchanged with peft itself, both ways: logits, gradients, names, no warnings."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tt_peft
from tt_peft import LoRAConfig
from tt_peft.adapter_files.state import entries

KINDS = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "target_modules": ("q_proj", "down_proj")},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {r"layers\.0\..*_proj": 3.0},
    },
    "expression": {"target_modules": r".*layers\.1\..*_proj|.*layers.0.self_attn.q_proj"},
    "layers": {"target_modules": "all-linear", "layers_to_transform": (1,)},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ("mlp.down_proj",)},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head", "q_proj")},
    "modules_to_save": {"modules_to_save": ("lm_head", "embed_tokens")},
    "norms saved": {"target_modules": ("v_proj",), "modules_to_save": ("norm",)},
}


@pytest.fixture
def quiet_peft():
    """peft, with every warning an error but those of transformers about its own names."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        yield peft


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_folder_without_a_warning_and_computes_the_same(
    kind, quiet_peft, make_llama, randomise, ids, tmp_path
):
    base = make_llama()
    ours = copy.deepcopy(base)
    tt_peft.apply_lora_(ours, LoRAConfig(rank=4, alpha=12, **KINDS[kind]))
    randomise(ours)
    tt_peft.save_adapter(ours, tmp_path, base_model="org/base")
    theirs = quiet_peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert not torch.allclose(ours(ids).logits, base(ids).logits, atol=1e-3)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    expected = {
        key
        for key in quiet_peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        if ".base_layer." not in key
    }
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected


def peft_config(peft, kind):
    changes = dict(KINDS[kind])
    targets = changes.pop("target_modules", ("q_proj", "v_proj"))
    if kind == "layers":
        targets = ["q_proj", "up_proj"]
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    return peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **changes,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_our_model_loads_a_folder_of_peft_and_computes_the_same_with_the_same_gradients(
    kind, make_llama, ids, tmp_path
):
    peft = pytest.importorskip("peft")
    base = make_llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(peft, kind))
    theirs.save_pretrained(str(tmp_path))
    ours = copy.deepcopy(base)
    config = tt_peft.load_adapter(ours, tmp_path)
    assert config.rank == 4
    theirs.train()
    ours.train()
    (ours(ids).logits ** 2).mean().backward()
    (theirs(ids).logits ** 2).mean().backward()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    wanted = peft_gradients(theirs)
    found = {entry.key: entry.parameter.grad for entry in entries(ours, "default")}
    assert set(wanted) == set(found)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def peft_gradients(model):
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", "")
            gradients[key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter.grad
    return gradients


def test_a_plain_mlp_goes_to_peft_and_back(randomise, tmp_path):
    peft = pytest.importorskip("peft")

    def mlp():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    ours, x = mlp(), torch.randn(4, 6)
    tt_peft.apply_lora_(ours, LoRAConfig(rank=2, target_modules="all-linear", use_dora=True))
    randomise(ours)
    tt_peft.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(mlp(), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = mlp()
    tt_peft.load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(x), ours(x), rtol=1e-5, atol=1e-5)


LOOSE = {
    "a target of another architecture": {"target_modules": ["q_proj", "query_key_value"]},
    "an exclusion of what is not there": {"target_modules": ["q_proj"], "exclude_modules": ["vision_tower"]},
    "patterns of what is not adapted": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"k": 2},
        "alpha_pattern": {"v": 3},
    },
    "a saved module that is not there": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "classifier"]},
}


@pytest.mark.parametrize("kind", LOOSE)
def test_names_that_peft_passes_over_are_passed_over_in_its_files(kind, make_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, init_lora_weights=False, **LOOSE[kind]))
    theirs.save_pretrained(str(tmp_path))
    ours = make_llama()
    tt_peft.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_classifier_goes_to_peft_and_back(randomise, ids, tmp_path, quiet_peft):
    """PEFT names both "classifier" and "score" in its file, and takes no classifier for a model that generates."""
    transformers = pytest.importorskip("transformers")

    def build():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(
            vocab_size=40, num_hidden_layers=1, num_labels=3, pad_token_id=0, initializer_range=0.05, **sizes
        )
        return transformers.LlamaForSequenceClassification(config).eval()

    theirs = quiet_peft.get_peft_model(build(), quiet_peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = build()
    assert tt_peft.load_adapter(ours, tmp_path / "theirs").modules_to_save == ("score",)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    randomise(ours)
    tt_peft.save_adapter(ours, tmp_path / "ours")
    again = quiet_peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_tied_adapters_of_peft_are_refused_by_name(make_llama, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    peft.get_peft_model(make_llama(tie_word_embeddings=True), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="ensure_weight_tying=True is not supported"):
        tt_peft.load_adapter(make_llama(tie_word_embeddings=True), tmp_path)


MATCHED = {
    "a lookahead in front": {"target_modules": r"(?!.*layers\.0\.).*(q|v)_proj"},
    "a whole name": {"target_modules": "model.layers.1.mlp.up_proj"},
    "a dot that means any character": {"target_modules": r"model.layers.1.self_attn.[qk]_proj"},
    "alternatives": {"target_modules": r"model\.layers\.0\.mlp\..*_proj|lm_head"},
    "a list of endings": {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "all-linear in capitals": {"target_modules": "ALL-LINEAR"},
    "an excluded expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"},
    "an excluded text that is a name": {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.1.self_attn.q_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers behind a name": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers and names": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["blocks", "layers"],
    },
    "a full name in another layer": {
        "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"],
        "layers_to_transform": [1],
    },
    "a rank by expression": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2, "(up|down)_proj": 6},
        "alpha_pattern": {"layers.0.*": 5, r"^model\.layers\.1\.mlp.*": 7},
    },
    "a rank by a negated expression": {"target_modules": ["q_proj"], "rank_pattern": {r"(?!.*layers\.0).*q_proj": 2}},
    "a target inside of a saved module": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    "a saved module and all-linear": {"target_modules": "all-linear", "modules_to_save": ["self_attn"]},
}


@pytest.mark.parametrize("kind", MATCHED)
def test_targets_mean_what_they_mean_in_peft(kind, make_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    settings = MATCHED[kind]
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    theirs.save_pretrained(str(tmp_path))
    ours = make_llama()
    tt_peft.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    if "modules_to_save" in settings or kind == "an excluded text that is a name":
        return  # what is an error or another thing in a config of ours
    renamed = {"target_modules": settings["target_modules"], **{k: v for k, v in settings.items() if k != "r"}}
    again = make_llama()
    tt_peft.apply_lora_(again, LoRAConfig(rank=4, alpha=8, **renamed))
    found = {key: tuple(tensor.shape) for key, tensor in tt_peft.adapter_state_dict(again).items()}
    state = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {k.removeprefix("base_model.model."): tuple(t.shape) for k, t in state.items() if ".base_layer." not in k}
    assert found == wanted
    scaling = {n: m.scaling["default"] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert scaling == {
        n: m.adapters.default.spec.scaling for n, m in again.named_modules() if isinstance(m, tt_peft.LoRALinear)
    }


def test_a_weight_among_target_parameters_is_the_linear_layer_that_has_it(make_llama, ids, tmp_path):
    """As peft writes a router that transformers 5 has as a plain parameter."""
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"up_proj.weight": 2}, "alpha_pattern": {"1.mlp.up_proj.weight": 40}}
    settings = {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"], **patterns}
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    theirs.save_pretrained(str(tmp_path))
    ours = make_llama()
    tt_peft.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    tt_peft.save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_the_automatic_class_of_peft_loads_our_folder_of_a_tied_or_untied_model(
    tie, quiet_peft, make_llama, randomise, ids, tmp_path
):
    base = make_llama(tie_word_embeddings=tie)
    base.save_pretrained(tmp_path / "base")
    tt_peft.apply_lora_(base, LoRAConfig(rank=2))
    randomise(base)
    tt_peft.save_adapter(base, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = quiet_peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_tied_model_without_an_output_layer_names_its_task(make_lm, tmp_path):
    model = make_lm()
    model.lm_head = None
    model.config = type("Config", (), {"tie_word_embeddings": True})
    tt_peft.apply_lora_(model, LoRAConfig(rank=2))
    tt_peft.save_adapter(model, tmp_path)
    assert tt_peft.adapter_files.folder.read_adapter_config(tmp_path)["task_type"] == "CAUSAL_LM"
