import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tt_ckpt


def test_an_unchanged_model_comes_back_byte_for_byte(tiny, model_dir, equal_dirs, tmp_path):
    source, model = model_dir(), tiny(2)
    tt_ckpt.load_weights(model, source)
    tt_ckpt.save_hf(model, tmp_path / "out", config=tt_ckpt.read_config(source), source=source)
    assert equal_dirs(source, tmp_path / "out") == []


def test_changed_values_keep_the_layout(tiny, model_dir, equal_dirs, tmp_path):
    source = model_dir()
    tt_ckpt.save_hf(tiny(9), tmp_path / "out", config=tt_ckpt.read_config(source), source=source)
    assert equal_dirs(source, tmp_path / "out") == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["llama", "tied", "sharded", "mistral", "qwen2"])
def test_directories_of_transformers_come_back_byte_for_byte(tmp_path, equal_dirs, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = {"mistral": "Mistral", "qwen2": "Qwen2"}.get(kind, "Llama")
    settings = getattr(transformers, f"{name}Config")(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    reference = getattr(transformers, f"{name}ForCausalLM")(settings).to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="60KB" if kind == "sharded" else "5GB")
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    config = tt_ckpt.read_config(tmp_path / "theirs")
    tt_ckpt.load_weights(model, tmp_path / "theirs", dtype=torch.bfloat16)
    tt_ckpt.save_hf(model, tmp_path / "ours", config=config, source=tmp_path / "theirs")
    assert equal_dirs(tmp_path / "theirs", tmp_path / "ours") == []
    limit = "60KB" if kind == "sharded" else "5GB"
    tt_ckpt.save_hf(model, tmp_path / "afresh", config=config, max_shard_size=limit)
    assert equal_dirs(tmp_path / "theirs", tmp_path / "afresh") == ["generation_config.json"]


def test_transformers_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(settings).eval()
    tt_ckpt.save_hf(model, tmp_path / "out", config=settings.to_dict(), max_shard_size="30KB")
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, 65, (2, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_max_shard_size_splits_and_wins_over_the_sources_layout(tiny, model_dir, tmp_path, equal_models):
    source = model_dir()
    tt_ckpt.save_hf(tiny(1), tmp_path / "out", config={}, source=source, max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 45_000 for shard in shards)
    model = tiny(2)
    tt_ckpt.load_weights(model, tmp_path / "out")
    assert equal_models(model, tiny(1))


def test_shards_and_metadata_of_the_source_are_kept(tiny, tmp_path, equal_dirs):
    source, state = tmp_path / "source", tiny(1).state_dict()
    source.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:1], "model-00002-of-00002.safetensors": names[1:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, source / file, metadata={"format": "pt", "who": "them"})
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text('{"model_type":"llama"}')
    tt_ckpt.save_hf(tiny(1), tmp_path / "out", config={"model_type": "llama"}, source=source)
    assert equal_dirs(source, tmp_path / "out") == []


def test_dtype_casts_floats_and_says_so_in_the_config(tiny, config, tmp_path):
    model = tiny()
    model.register_buffer("steps", torch.tensor([3]))
    tt_ckpt.save_hf(model, tmp_path / "out", config=config(), dtype=torch.bfloat16)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert weights["steps"].dtype == torch.int64
    assert tt_ckpt.read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    tt_ckpt.save_hf(tiny(), tmp_path / "kept", config=config())
    assert load_file(tmp_path / "kept" / "model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_each_tensor_keeps_the_dtype_that_the_base_has(tiny, model_dir, equal_dirs, tmp_path):
    source = model_dir(dtype=torch.bfloat16)
    mixed = {
        key: tensor.float() if "norm" in key else tensor.half() if "mlp" in key else tensor
        for key, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    config = tt_ckpt.read_config(source) | {"torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    dtypes = tt_ckpt.tensor_dtypes(source)
    assert dtypes == {key: tensor.dtype for key, tensor in mixed.items()}
    model = tiny(2)
    tt_ckpt.load_weights(model, source)  # into fp32
    tt_ckpt.save_hf(model, tmp_path / "out", config=config, source=source, dtype=dtypes)
    assert equal_dirs(source, tmp_path / "out") == []


def test_the_config_names_the_dtype_that_most_values_have(tiny, config, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    kinds = {"model.norm.weight": torch.float32, "no.such": torch.float16}
    tt_ckpt.save_hf(model, tmp_path / "out", config=config(dtype="float32"), dtype=kinds)
    found = tt_ckpt.read_config(tmp_path / "out")
    assert (found["dtype"], found["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert tt_ckpt.tensor_dtypes(tmp_path / "out")["model.norm.weight"] == torch.float32


def test_the_metadata_says_pytorch(tiny, tmp_path):
    tt_ckpt.save_hf(tiny(), tmp_path / "out", config={})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_companion_files_are_copied_and_weights_are_not(tiny, model_dir, tmp_path):
    source = model_dir()
    wanted = ["tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
              "merges.txt",
              "vocab.json", "LICENSE"]  # fmt: skip
    unwanted = ["pytorch_model.bin", "optimizer.pt", "README.md", ".env"]
    for name in wanted + unwanted:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, source=source)
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {*wanted, "tokenizer.json", "generation_config.json", "config.json", "model.safetensors",
                     "additional_chat_templates/tool_use.jinja"}  # fmt: skip


def test_files_are_written_instead_of_the_sources_own(tiny, model_dir, tmp_path):
    source = model_dir()
    (source / "chat_template.jinja").write_text("theirs")
    (tmp_path / "mine").write_bytes(b"\x00mine")
    given = {"chat_template.jinja": "{{ ours }} \u00fc", "tokenizer.json": tmp_path / "mine"}
    tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, source=source, files=given)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == "{{ ours }} \u00fc".encode()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00mine"
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 2}\n'


@pytest.mark.parametrize("name", ["../escaped", "sub/file", "/etc/x", "..", ""])
def test_the_name_of_a_file_that_leaves_the_folder_is_refused(tiny, tmp_path, name):
    with pytest.raises(ValueError, match=r"save_hf\(files=...\): refused the file name"):
        tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, files={name: "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tiny, model_dir, tmp_path, monkeypatch):
    source = model_dir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for write in (
        lambda: tt_ckpt.save_hf(tiny(), tmp_path / "deep" / "out", config={}),
        lambda: tt_ckpt.convert(source, tmp_path / "deep" / "out", dry_run=True),
    ):
        with pytest.raises(OSError, match=r"1.0 KB free, the model needs \d+.\d KB; free some") as caught:
            write()
        assert caught.value.filename == str(tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_can_fail_for_its_own_reasons_is_written_before_the_weights(tiny, model_dir, tmp_path, monkeypatch):
    source = model_dir()
    (source / "tokenizer_config.json").symlink_to(tmp_path / "away")
    (tmp_path / "away").write_text("{}")
    monkeypatch.setattr("tt_ckpt.hf.save.write_shards", lambda *_: pytest.fail("the weights came first"))
    with pytest.raises(ValueError, match="a link that leaves its folder"):
        tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, source=source)
    with pytest.raises(FileNotFoundError):
        tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, files={"README.md": tmp_path / "none"})


def test_links_in_the_source_that_leave_it_are_not_copied(tiny, model_dir, tmp_path):
    source = model_dir()
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="a link that leaves its folder"):
        tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, source=source)
    assert not (tmp_path / "out").exists()


def test_modes_follow_the_umask(tiny, model_dir, tmp_path):
    before = os.umask(0o027)
    try:
        tt_ckpt.save_hf(tiny(), tmp_path / "out", config={}, source=model_dir())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_weights_are_written_over_only_when_allowed(tiny, tmp_path, equal_models):
    tt_ckpt.save_hf(tiny(1), tmp_path / "out", config={}, max_shard_size="40KB")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="contains model-00001-of-"):
        tt_ckpt.save_hf(tiny(2), tmp_path / "out", config={})
    tt_ckpt.save_hf(tiny(2), tmp_path / "out", config={}, overwrite=True)
    model = tiny(3)
    tt_ckpt.load_weights(model, tmp_path / "out")
    assert equal_models(model, tiny(2))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "out").glob("model-*"))


def test_a_file_of_the_user_that_is_no_weights_file_is_not_replaced_either(tiny, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        out, source = tmp_path / name / "out", tmp_path / name / "source"
        out.mkdir(parents=True)
        source.mkdir()
        (source / "tokenizer.json").write_text("{}")
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name}: another file is there"):
            tt_ckpt.save_hf(tiny(), out, config={}, source=source)
        assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "mine")]
        tt_ckpt.save_hf(tiny(), out, config={}, source=source, overwrite=True)
        assert (out / name).read_text() != "mine"


def test_a_map_of_the_old_weights_survives_overwriting(tiny, tmp_path):
    tt_ckpt.save_hf(tiny(1), tmp_path / "out", config={})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tt_ckpt.save_hf(tiny(2), tmp_path / "out", config={}, overwrite=True)
        assert torch.equal(file.get_tensor("lm_head.weight"), tiny(1).lm_head.weight)


def test_a_model_is_not_saved_beside_an_adapter_that_loaders_would_put_on_top(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="contains an adapter, which transformers would apply to the model"):
        tt_ckpt.save_hf(tiny(), tmp_path, config={}, overwrite=True)


def test_what_a_config_says_is_kept_and_read_whatever_its_form(model_dir, tiny, tmp_path):
    source = model_dir()
    text = (source / "config.json").read_text().rstrip()[:-1] + ', "limit": Infinity}'
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as some editors on Windows save it
    config = tt_ckpt.read_config(source)
    tt_ckpt.save_hf(tiny(), tmp_path / "out", config={**config, "torch_dtype": "bfloat16"}, dtype=torch.bfloat16)
    assert tt_ckpt.read_config(tmp_path / "out")["limit"] == float("inf")


def test_an_existing_empty_directory_is_used(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    tt_ckpt.save_hf(tiny(), tmp_path / "out", config={})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failure_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tt_ckpt.commit.fsync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        tt_ckpt.save_hf(tiny(), tmp_path / "deep" / "out", config={})
    assert list((tmp_path / "deep").iterdir()) == []


def test_meta_and_quantized_parameters_are_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="model.embed_tokens.weight is on the meta device"):
        tt_ckpt.save_hf(tiny(device="meta"), tmp_path / "out", config={})

    class Packed(torch.Tensor):
        pass

    model = tiny()
    model.model.norm.weight = nn.Parameter(torch.ones(32).as_subclass(Packed))
    with pytest.raises(ValueError, match=r"model.norm.weight is a Packed: merge or dequantize"):
        tt_ckpt.save_hf(model, tmp_path / "out", config={})


def test_tied_parameters_are_written_once(tiny, tmp_path):
    model = tiny()
    model.lm_head.weight = model.model.embed_tokens.weight
    tt_ckpt.save_hf(model, tmp_path / "out", config={})
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_progress_counts_every_byte(tiny, tmp_path):
    seen, model = [], tiny()
    tt_ckpt.save_hf(model, tmp_path / "out", config={}, progress=lambda done, total: seen.append((done, total)))
    whole = sum(p.nbytes for p in model.parameters())
    assert seen[-1] == (2 * whole, 2 * whole)  # written and read back


def test_a_config_is_read_or_explained(model_dir, tmp_path, config):
    source = model_dir()
    assert tt_ckpt.read_config(source) == config()
    (source / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        tt_ckpt.read_config(source)
    (source / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"config.json: missing; the directory contains generation_config.json, model"
    ):
        tt_ckpt.read_config(source)


def test_a_path_that_is_none_gets_a_suggestion(model_dir, tmp_path):
    source = model_dir()
    with pytest.raises(FileNotFoundError, match="did you mean .*source"):
        tt_ckpt.resolve(tmp_path / "sourse")
    with pytest.raises(FileNotFoundError, match="working directory"):
        tt_ckpt.resolve("./no/such/place")
    with pytest.raises(ValueError, match="a file; give the model directory"):
        tt_ckpt.resolve(source / "config.json")
    assert tt_ckpt.resolve(str(source)) == source


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_written_over_comes_back_when_anything_fails(tiny, model_dir, tmp_path, monkeypatch, error):
    """At every rename: also the source itself must not be lost to a Ctrl-C while it is replaced by its new self."""
    path, rename = model_dir(), Path.rename
    before, calls = contents(path), 0

    def fail_at(number):
        def failing(self, target):
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return rename(self, target)

        return failing

    for number in range(1, 30):
        calls = 0
        monkeypatch.setattr(Path, "rename", fail_at(number))
        try:
            tt_ckpt.save_hf(tiny(7), path, config=tiny().config.__dict__, source=path, overwrite=True)
        except type(error):
            assert contents(path) == before
            continue
        break
    assert number > 6
    assert contents(path).keys() == before.keys()
    assert contents(path)["model.safetensors"] != before["model.safetensors"]


def test_an_existing_directory_may_be_a_disk_of_its_own(tiny, tmp_path, monkeypatch):
    """All is prepared inside of it: a rename from beside it would fail."""
    path = tmp_path / "mounted"
    path.mkdir()
    seen = []
    monkeypatch.setattr("tt_ckpt.hf.save.write_config", lambda *args: seen.extend(p.name for p in tmp_path.iterdir()))
    tt_ckpt.save_hf(tiny(), path, config={})
    assert seen == ["mounted"]
    assert [p.name for p in path.iterdir()] == ["model.safetensors"]


def test_two_that_write_the_same_directory_do_not_mix(tiny, config, tmp_path, monkeypatch, equal_models):
    path, write_config = tmp_path / "out", tt_ckpt.hf.save.write_config

    def other_comes_first(*args):
        monkeypatch.setattr("tt_ckpt.hf.save.write_config", write_config)
        tt_ckpt.save_hf(tiny(2), path, config=config(), max_shard_size="20KB")
        write_config(*args)

    monkeypatch.setattr("tt_ckpt.hf.save.write_config", other_comes_first)
    with pytest.raises(FileExistsError, match=r"model-00001-of-\d+.safetensors was written meanwhile"):
        tt_ckpt.save_hf(tiny(1), path, config=config())
    found = tiny(3)
    tt_ckpt.load_weights(found, path)
    assert equal_models(found, tiny(2))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_in_place_of_a_file_is_explained_and_left(tiny, config, tmp_path, name):
    path = tmp_path / "out"
    (path / name).mkdir(parents=True)
    (path / name / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}: a directory is there"):
        tt_ckpt.save_hf(tiny(), path, config=config(), overwrite=True)
    assert list(contents(path)) == [f"{name}/kept"]


def test_a_link_to_nothing_is_explained(tiny, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="a link to nothing is there"):
        tt_ckpt.save_hf(tiny(), tmp_path / "link", config={})


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_an_empty_parameter_is_written_and_read_back(tmp_path, shape):
    model = nn.Linear(3, 2)
    model.rows = nn.Parameter(torch.empty(shape))
    tt_ckpt.save_hf(model, tmp_path / "out", config={}, dtype=torch.bfloat16)
    assert tt_ckpt.open_tensors(tmp_path / "out")["rows"].shape == shape


def test_values_that_a_dtype_cannot_hold_are_an_error(tiny, tmp_path):
    model = tiny()
    model.model.norm.weight.data[:2] = 1e6
    with pytest.raises(ValueError, match=r"model.norm.weight: 2 values overflow float16"):
        tt_ckpt.save_hf(model, tmp_path / "out", config={}, dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    model.model.norm.weight.data[:2] = float("inf")  # what was not finite before is not for a cast to judge
    tt_ckpt.save_hf(model, tmp_path / "out", config={}, dtype=torch.float16)
