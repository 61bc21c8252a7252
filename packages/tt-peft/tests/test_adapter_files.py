"""Adapter folders, both ways, against peft itself."""

import contextlib
import copy
import json
import random
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tt_peft
from tt_peft import LoRAConfig

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
    "expression": {"target_modules": (r"layers\.1\..*_proj", "layers.0.self_attn.q_proj")},
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
    if kind == "expression":
        targets = r".*layers\.1\..*_proj|.*layers.0.self_attn.q_proj"
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
    found = {e.key: tt_state_gradient(e) for e in entries(ours)}
    assert set(wanted) == set(found)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def entries(model):
    from tt_peft.state import entries

    return list(entries(model, "default"))


def tt_state_gradient(entry):
    assert entry.parameter.grad is not None, entry.key
    return entry.parameter.grad


def peft_gradients(model):
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", "")
            gradients[key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter.grad
    return gradients


def test_a_folder_written_twice_is_byte_equal_and_readable_by_others(make_lm, randomise, tmp_path):
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig())
    randomise(model)
    one, two = tmp_path / "one", tmp_path / "two"
    assert tt_peft.save_adapter(model, one, base_model="org/base") == one
    tt_peft.save_adapter(model, two, base_model="org/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
        assert (one / name).stat().st_mode & 0o044 == 0o044
    assert sorted(p.name for p in one.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(one / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    assert json.loads((one / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_save_and_load_keep_every_bit(make_lm, randomise, ids, tmp_path):
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=3, alpha=5, target_modules="all-linear", modules_to_save="norm"))
    randomise(model)
    tt_peft.save_adapter(model, tmp_path)
    again = make_lm()
    tt_peft.load_adapter(again, tmp_path)
    assert torch.equal(model(ids), again(ids))
    state, other = tt_peft.adapter_state_dict(model), tt_peft.adapter_state_dict(again)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_the_dtype_of_the_file_is_that_of_the_adapter(make_lm, tmp_path):
    model = make_lm().bfloat16()
    tt_peft.apply_lora_(model, LoRAConfig(dtype=torch.float32))
    tt_peft.save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = make_lm().bfloat16()
    tt_peft.load_adapter(again, tmp_path)
    assert {p.dtype for p in tt_peft.adapter_parameters(again).values()} == {torch.bfloat16}


@pytest.fixture
def folder(make_lm, randomise, tmp_path):
    """An adapter of the plain model with two layers."""
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=4))
    randomise(model)
    return tt_peft.save_adapter(model, tmp_path / "adapter", base_model="org/base")


@pytest.mark.parametrize("sizes", [{"layers": 1}, {"layers": 3}, {"dim": 64}, {"vocab": 48}])
def test_an_adapter_of_another_shape_is_refused(sizes, folder, make_lm):
    with pytest.raises(ValueError, match=r"trained on org/base, but the model here is another: names or shapes differ"):
        tt_peft.load_adapter(make_lm(**sizes), folder)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(folder, make_lm):
    with pytest.raises(ValueError, match=r"the values of its weights differ"):
        tt_peft.load_adapter(make_lm(seed=5), folder)
    tt_peft.load_adapter(make_lm(seed=5), folder, check_base=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_recognised(dtype, folder, make_lm):
    tt_peft.load_adapter(make_lm().to(dtype), folder)


def test_the_same_base_in_nf4_is_recognised(folder, make_lm):
    tt_peft.load_adapter(make_lm(), folder, quantize_base=True)
    with pytest.raises(ValueError, match="values of its weights differ"):
        tt_peft.load_adapter(make_lm(seed=5), folder, quantize_base=True)


def strip_metadata(folder):
    """As if peft had written the folder."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 1}, r"has weights for unknown model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj"),
        ({"layers": 3}, r"has no weights for model.layers.2.self_attn.q_proj"),
        ({"dim": 64}, r"q_proj.lora_A.weight has shape \[4, 32\], expected \[4, 64\]"),
    ],
)
def test_a_folder_of_peft_for_another_shape_is_refused(sizes, message, folder, make_lm):
    strip_metadata(folder)
    with pytest.raises(ValueError, match=message):
        tt_peft.load_adapter(make_lm(**sizes), folder)


def test_a_folder_of_peft_for_another_base_name_is_refused(folder, make_lm):
    strip_metadata(folder)
    with pytest.raises(ValueError, match=r"trained on org/base, but the model here is org/other"):
        tt_peft.load_adapter(make_lm(), folder, base_model="org/other")
    tt_peft.load_adapter(make_lm(), folder, base_model="/models/base")


def test_a_tensor_that_nothing_asked_for_is_refused(folder, make_lm):
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(40, 32)}, file)
    with pytest.raises(ValueError, match=r"has weights for unknown lm_head.weight"):
        tt_peft.load_adapter(make_lm(), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("some_new_feature", {"on": True}),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
    ],
)
def test_a_feature_of_peft_that_we_lack_is_refused_by_name(key, value, folder, make_lm):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {key}"):
        tt_peft.load_adapter(make_lm(), folder)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout", "target_modules"])
def test_a_wrong_value_in_the_config_names_the_file(key, folder, make_lm):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: -1 if key != "target_modules" else ["q_prj"]}))
    with pytest.raises(ValueError, match=r"adapter_config.json|did you mean 'q_proj'"):
        tt_peft.load_adapter(make_lm(), folder)


def test_a_broken_adapter_is_refused_by_tensor(folder, make_lm):
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    state[key][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_A.weight has NaN or infinite values"):
        tt_peft.load_adapter(make_lm(), folder)
    save_file({**state, key: torch.zeros(4, 32, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is torch.int8, expected floating point"):
        tt_peft.load_adapter(make_lm(), folder)


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


def test_a_mangled_folder_is_an_error_of_ours_or_loads(folder, make_lm):
    """2 x 150 seeded mutations of the two files: nothing but ValueError and FileNotFoundError comes out."""
    chance = random.Random(0)
    originals = {file: file.read_bytes() for file in folder.iterdir()}
    refused, messages = 0, []
    for file in originals:
        for _ in range(150):
            content = bytearray(originals[file])
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(min(len(content), 2500))
                content[at : at + chance.randint(0, 3)] = bytes(chance.choices(range(256), k=chance.randint(0, 3)))
            file.write_bytes(content)
            try:
                tt_peft.load_adapter(make_lm(), folder)
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                messages.append(str(error))
        file.write_bytes(originals[file])
    assert refused > 150
    assert not any("\n" in message for message in messages)
    values = (None, 0, -1, 1e99, "x", "", [], {}, [1], {"a": "b"}, True, [[]])
    settings = json.loads((folder / "adapter_config.json").read_text())
    for key in settings:
        for value in values:
            (folder / "adapter_config.json").write_text(json.dumps({**settings, key: value}))
            with contextlib.suppress(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tt_peft.load_adapter(make_lm(), folder)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        tt_peft.load_adapter(make_lm(), folder)


def test_an_adapter_that_the_model_has_must_agree_with_the_file(folder, make_lm):
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=4, alpha=8))
    with pytest.raises(ValueError, match=r"scaling is 4.0 for .*, but the model's 'default' has 2.0"):
        tt_peft.load_adapter(model, folder)
    tt_peft.load_adapter(model, folder, adapter="second")
    assert tt_peft.adapter_names(model) == ["default", "second"]


def test_damaged_and_missing_files_are_named(folder, make_lm, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json not found: not an adapter folder"):
        tt_peft.load_adapter(make_lm(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        tt_peft.load_adapter(make_lm(), tmp_path / "nowhere")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or no safetensors file"):
        tt_peft.load_adapter(make_lm(), folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"is a pickle"):
        tt_peft.load_adapter(make_lm(), folder)
    (folder / "adapter_config.json").write_text('{"r": 4')
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        tt_peft.load_adapter(make_lm(), folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object, found a list"):
        tt_peft.load_adapter(make_lm(), folder)
