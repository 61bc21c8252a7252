"""Adapter folders: what is in them, whose they are, and what is wrong with them."""

import contextlib
import json
import os
import random
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tt_peft
from tt_peft import LoRAConfig


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


def test_the_dtype_of_the_file_is_that_of_the_adapter_when_saved_and_when_loaded(make_lm, tmp_path):
    model = make_lm().bfloat16()
    tt_peft.apply_lora_(model, LoRAConfig(dtype=torch.float32))
    tt_peft.save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = make_lm().bfloat16()
    tt_peft.load_adapter(again, tmp_path)
    assert {p.dtype for p in tt_peft.adapter_parameters(again).values()} == {torch.float32}


@pytest.fixture
def folder(make_lm, randomise, tmp_path):
    """An adapter of the plain model with two layers."""
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=4))
    randomise(model)
    return tt_peft.save_adapter(model, tmp_path / "adapter", base_model="org/base")


@pytest.mark.parametrize("sizes", [{"layers": 1}, {"layers": 3}, {"dim": 64}, {"vocab": 48}])
def test_an_adapter_of_another_shape_is_refused(sizes, folder, make_lm):
    with pytest.raises(
        ValueError, match=r"trained on org/base, but the model here is different: names or shapes differ"
    ):
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
    model = make_lm(**sizes)
    with pytest.raises(ValueError, match=message):
        tt_peft.load_adapter(model, folder)
    assert [type(m) for m in model.modules()] == [type(m) for m in make_lm(**sizes).modules()]


def test_a_folder_of_peft_for_another_base_name_is_refused(folder, make_lm):
    strip_metadata(folder)
    with pytest.raises(ValueError, match=r"trained on org/base, but the model here is org/other"):
        tt_peft.load_adapter(make_lm(), folder, base_model="org/other")
    tt_peft.load_adapter(make_lm(), folder, base_model="/models/base")


@pytest.mark.parametrize(
    "metadata", ["[]", "{", '{"values": 3}', '{"shapes": 1, "values": {"lm_head.weight": ["a"]}}', "[" * 9999]
)
def test_damaged_metadata_is_refused(metadata, folder, make_lm):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "tt_base": metadata})
    with pytest.raises(ValueError, match=r"the metadata 'tt_base' is damaged|names or shapes differ"):
        tt_peft.load_adapter(make_lm(), folder)


def test_a_tensor_that_nothing_asked_for_is_refused(folder, make_lm):
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(40, 32)}, file)
    with pytest.raises(ValueError, match=r"differs from the base's in 40 of 40 rows, .*: another base"):
        tt_peft.load_adapter(make_lm(), folder)
    save_file({**load_file(file), "base_model.model.extra.weight": torch.zeros(40, 32)}, file)
    with pytest.raises(ValueError, match=r"has weights for unknown extra.weight"):
        tt_peft.load_adapter(make_lm(), folder, check_base=False)


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
    save_file({**state, key: torch.zeros(0)}, file)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is empty: the shards of .* were not gathered"):
        tt_peft.load_adapter(make_lm(), folder)
    save_file({**state, key: torch.zeros(4, 32, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is torch.int8, expected floats"):
        tt_peft.load_adapter(make_lm(), folder)


def test_the_adapter_of_a_name_is_saved_and_the_base_s_name_is_known(make_llama, randomise, ids, tmp_path):
    model = make_llama()
    model.config._name_or_path = "org/llama"
    tt_peft.apply_lora_(model, LoRAConfig(rank=2))
    tt_peft.apply_lora_(model, LoRAConfig(rank=3, target_modules="o_proj"), adapter="second")
    randomise(model)
    settings = {}
    for name in ("default", "second"):
        folder = tt_peft.save_adapter(model, tmp_path / "deep" / name, adapter=name)
        settings[name] = tt_peft.adapter_files.folder.read_adapter_config(folder)
    assert [s["r"] for s in settings.values()] == [2, 3]
    assert settings["second"]["target_modules"] == ["o_proj"]
    assert settings["second"]["base_model_name_or_path"] == "org/llama"
    again = make_llama()
    tt_peft.load_adapter(again, tmp_path / "deep" / "second")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_failed_write_leaves_the_old_folder(folder, make_lm, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig(rank=4))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tt_peft.save_adapter(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


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
    with pytest.raises(ValueError, match="not valid JSON: nested too deeply"):
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
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or not a safetensors file"):
        tt_peft.load_adapter(make_lm(), folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"is a pickle"):
        tt_peft.load_adapter(make_lm(), folder)
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}')
    weights.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"no peft_type: .* \(it contains: fine_tune_type, lora_parameters\); convert it to"
    ):
        tt_peft.load_adapter(make_lm(), folder)
    (folder / "adapter_config.json").write_text('{"r": 4')
    with pytest.raises(ValueError, match=r"adapter_config.json:1:8: not valid JSON"):
        tt_peft.load_adapter(make_lm(), folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON object, found \[\]"):
        tt_peft.load_adapter(make_lm(), folder)


def test_weights_for_a_name_that_the_model_lacks_are_refused(folder, make_lm):
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["score"]}))
    save_file({**load_file(file), "base_model.model.score.weight": torch.zeros(3, 32)}, file)
    with pytest.raises(ValueError, match=r"has weights for unknown score.weight"):
        tt_peft.load_adapter(make_lm(), folder, check_base=False)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_is_none_is_our_error(key, folder, make_lm):
    file = folder / "adapter_config.json"
    value = {"q_proj(": 2} if key.endswith("pattern") else "q_proj("
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=r"'q_proj\(' is not a valid regular expression"):
        tt_peft.load_adapter(make_lm(), folder)


def test_a_failed_load_leaves_the_model_as_it_was(folder, make_lm, randomise, ids):
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("lora_B.weight"))
    save_file({**state, key: torch.zeros(5, 4)}, file, {"format": "pt"})
    model = make_lm()
    with pytest.raises(ValueError, match=r"has shape \[5, 4\]"):
        tt_peft.load_adapter(model, folder)
    assert all(p.requires_grad for p in model.parameters())
    tt_peft.apply_lora_(model, LoRAConfig(target_modules="up_proj"), adapter="kept")
    randomise(model)
    expected, trained = model(ids), list(tt_peft.adapter_parameters(model))
    with pytest.raises(ValueError, match=r"has shape \[5, 4\]"):
        tt_peft.load_adapter(model, folder)
    assert tt_peft.active_adapters(model) == ("kept",)
    assert list(tt_peft.adapter_parameters(model)) == trained
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o644), (0o022, 0o644), (0o077, 0o600)])
def test_modes_are_0644_and_0755_less_the_umask(umask, mode, make_lm, tmp_path):
    model = make_lm()
    tt_peft.apply_lora_(model, LoRAConfig())
    before = os.umask(umask)
    try:
        folder = tt_peft.save_adapter(model, tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}
    assert folder.stat().st_mode & 0o777 == 0o755 & ~umask


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: "_orig_mod." + key,
        lambda key: "module." + key,
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda key: key.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight"),
    ],
)
def test_names_of_wrappers_and_of_the_adapter_in_the_keys_are_read_past(rename, folder, make_lm, ids):
    """A compiled or sharded model, or a raw dump of its state, leaves them there."""
    expected = make_lm()
    tt_peft.load_adapter(expected, folder)
    strip_metadata(folder)
    file = folder / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(file).items()}, file)
    model = make_lm()
    tt_peft.load_adapter(model, folder)
    assert torch.equal(model(ids), expected(ids))
