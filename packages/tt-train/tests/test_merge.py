"""A merge tensor by tensor gives the bytes, report and errors of a merge by a model, and never more than it knows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tt_ckpt
import tt_models
import tt_peft
import tt_train
from tt_train.models import merge
from tt_train.models.origin import find_origin

LINEAR = {
    "the default": {},
    "rslora": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*1\.self_attn\.v_proj": 3.0}},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "pissa": {"init": "pissa"},
    "the output projection": {"target_modules": ("o_proj", "lm_head")},
}
BY_A_MODEL = {
    "an embedding": {"target_modules": ("embed_tokens", "q_proj")},
    "a module trained in full": {"modules_to_save": ("lm_head",)},
    "a norm trained in full": {"modules_to_save": ("model.norm",)},
}


FUSED = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": None, "sliding_window": None}
TIED = {"tie_word_embeddings": True}


def write_base(model_dir, folder, changes):
    """A model with random weights, and the tokenizer of ``model_dir``."""
    config = json.loads((model_dir / "config.json").read_text()) | changes
    tt_ckpt.save_hf(tt_models.build(tt_models.config_from_hf(config)), folder, config=config, source=model_dir)
    return folder


def write_adapter(base, folder, *, scale=0.3, rank=4, **lora):
    model = tt_train.load(base, device="cpu")[0]
    torch.manual_seed(1)
    tt_peft.apply_lora_(model, tt_peft.LoRAConfig(rank=rank, **lora))
    for parameter in tt_peft.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter.data, std=scale)
    return tt_peft.save_adapter(model, folder, base_model=str(base))


def is_by_tensors(path, dtype=None):
    return merge.merged_tensors(find_origin(path), dtype) is not None


def merged_by_a_model(path, output, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(merge, "merged_tensors", lambda *_: None)
        return tt_train.merge_run(path, output, **options)


def assert_same_folder(one, other):
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "in bf16"])
@pytest.mark.parametrize("kind", LINEAR)
def test_both_merges_write_the_same_bytes_and_say_the_same(model_dir, tmp_path, monkeypatch, kind, dtype):
    adapter = write_adapter(model_dir, tmp_path / "adapter", **LINEAR[kind])
    assert is_by_tensors(adapter, dtype)
    said, said_by_model = [], []
    tt_train.merge_run(adapter, tmp_path / "out", dtype=dtype, tell=said.append)
    merged_by_a_model(adapter, tmp_path / "again", monkeypatch, dtype=dtype, tell=said_by_model.append)
    assert_same_folder(tmp_path / "out", tmp_path / "again")
    assert said == said_by_model


@pytest.mark.parametrize("changes", [FUSED, TIED], ids=["fused projections", "a tied output projection"])
def test_tensors_are_merged_as_they_are_stored(model_dir, tmp_path, monkeypatch, changes):
    base = write_base(model_dir, tmp_path / "base", changes)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    assert is_by_tensors(adapter)
    tt_train.merge_run(adapter, tmp_path / "out")
    assert_same_folder(tmp_path / "out", merged_by_a_model(adapter, tmp_path / "again", monkeypatch))


@pytest.mark.parametrize("size", ["20KB", "60KB"])
def test_the_shards_and_the_index_of_the_base_are_kept(model_dir, tmp_path, monkeypatch, size):
    config = tt_ckpt.read_config(model_dir)
    model, base = tt_train.load(model_dir, device="cpu")[0], tmp_path / "base"
    tt_ckpt.save_hf(model, base, config=config, source=model_dir, max_shard_size=size)
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    assert is_by_tensors(adapter)
    tt_train.merge_run(adapter, tmp_path / "out")
    assert_same_folder(tmp_path / "out", merged_by_a_model(adapter, tmp_path / "again", monkeypatch))


def test_a_merge_of_linear_layers_needs_room_on_the_disk(model_dir, tmp_path, monkeypatch):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    with pytest.raises(tt_train.ConfigError, match="9 bytes free, the model needs"):
        tt_train.merge_run(adapter, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_a_failure_between_two_tensors_leaves_nothing_behind(model_dir, tmp_path, monkeypatch):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    seen = []

    def interrupted(name, *given, **options):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return tt_peft.merge.merged_weight(name, *given, **options)

    monkeypatch.setattr(merge, "merged_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tt_train.merge_run(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_merge_of_linear_layers_loads_no_model(model_dir, tmp_path, monkeypatch):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    monkeypatch.setattr(tt_ckpt, "load_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    tt_train.merge_run(adapter, tmp_path / "out")
    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


@pytest.mark.parametrize("kind", BY_A_MODEL)
def test_what_only_a_model_can_tell_is_merged_by_a_model(model_dir, tmp_path, kind):
    adapter = write_adapter(model_dir, tmp_path / "adapter", **BY_A_MODEL[kind])
    assert not is_by_tensors(adapter)
    tt_train.merge_run(adapter, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*shares its weight")
def test_a_tied_embedding_is_refused_as_by_a_model(model_dir, tmp_path):
    base = write_base(model_dir, tmp_path / "base", TIED)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(ValueError, match="shares its weight with the output projection"):
        tt_train.merge_run(adapter, tmp_path / "out")


def test_an_adapter_that_does_not_say_what_it_was_trained_on_is_merged_by_a_model(model_dir, tmp_path):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})  # as PEFT writes it
    assert not is_by_tensors(adapter)


def test_shards_that_cannot_be_kept_are_left_to_a_model(model_dir, tmp_path, monkeypatch):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    whole = merge.choose_layout
    monkeypatch.setattr(merge, "choose_layout", lambda origins, specs, _: whole(origins, specs, "20KB"))
    assert not is_by_tensors(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "lama"}, "lama"), ({"num_hidden_layers": 3}, "layers.2"), ({"vocab_size": 9999}, "9999")],
)
def test_a_base_whose_config_no_longer_fits_its_tensors_is_refused(model_dir, tmp_path, changes, message):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_dir, base)
    write_adapter(base, adapter)
    changed_config(base, name="config.json", **changes)
    with pytest.raises(ValueError, match=message):
        tt_train.merge_run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed_config(adapter, name="adapter_config.json", **changes):
    file = adapter / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, "has weights for unknown"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "has no weights for"),
        ({"r": 3}, "expected|rank"),
        ({"peft_type": "IA3"}, "only 'LORA' is supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices are set"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_an_adapter_whose_files_disagree_is_refused_with_the_words_of_a_load(model_dir, tmp_path, changes, message):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    changed_config(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        tt_train.merge_run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_and_a_broken_one_are_refused_with_the_words_of_a_load(model_dir, tmp_path):
    adapter = write_adapter(model_dir, tmp_path / "adapter")
    tensors = load_file(model_dir / "model.safetensors")
    (tmp_path / "other").mkdir()
    for file in model_dir.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(3)
    changed = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the values of its weights differ"):
        tt_train.merge_run(adapter, tmp_path / "out", base=str(tmp_path / "other"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensor is not finite: {name} \(1 of"):
        tt_train.merge_run(adapter, tmp_path / "out", base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_a_value_that_overflows_is_named_as_by_a_model(model_dir, tmp_path, monkeypatch):
    adapter = write_adapter(model_dir, tmp_path / "adapter", scale=300.0, target_modules="all-linear")
    assert is_by_tensors(adapter, torch.float16)
    with pytest.raises(ValueError, match="overflow float16") as by_tensors:
        tt_train.merge_run(adapter, tmp_path / "out", dtype=torch.float16)
    with pytest.raises(ValueError, match="overflow float16") as by_a_model:
        merged_by_a_model(adapter, tmp_path / "out", monkeypatch, dtype=torch.float16)
    assert str(by_tensors.value) == str(by_a_model.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{}, TIED], ids=["untied", "tied"])
def test_a_merged_and_saved_model_computes_what_was_trained_and_keeps_its_embeddings(model_dir, tmp_path, changes):
    base = write_base(model_dir, tmp_path / "base", changes)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    ids = torch.arange(3, 60)[None]
    tt_train.merge_run(adapter, tmp_path / "merged")
    with torch.no_grad():
        expected, found = (tt_train.load(path, device="cpu")[0](ids) for path in (adapter, tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert after.keys() == before.keys()
    assert ("lm_head.weight" in after) == (not changes)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & after.keys():
        assert torch.equal(after[name], before[name])
