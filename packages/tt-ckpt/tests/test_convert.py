import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tt_ckpt
from tt_ckpt.formats.translation import Rename, to_half_split, to_interleaved


def round_trip(source, between, back, to, **options):
    first = tt_ckpt.convert(source, between, to, **options)
    second = tt_ckpt.convert(between, back, "hf", allow_pickle=True)
    return first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("to", ["meta", "torchtune", "hf"])
def test_there_and_back_is_byte_equal(model_dir, equal_dirs, tmp_path, to, tied, dtype):
    source = model_dir(dtype=dtype, tie_word_embeddings=tied, torch_dtype=str(dtype).removeprefix("torch."))
    round_trip(source, tmp_path / "between", tmp_path / "back", to)
    assert equal_dirs(source, tmp_path / "back") == []


@pytest.mark.parametrize("to", ["meta", "torchtune"])
def test_shards_come_back_as_the_same_tensors(tiny, config, tmp_path, to):
    tt_ckpt.save_hf(tiny(), tmp_path / "source", config=config(), max_shard_size="40KB")
    round_trip(tmp_path / "source", tmp_path / "between", tmp_path / "back", to)
    source, back = tt_ckpt.open_tensors(tmp_path / "source"), tt_ckpt.open_tensors(tmp_path / "back")
    assert source.specs == back.specs
    assert all(torch.equal(source[name], back[name]) for name in source)


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("vocab_size", [64, 100_000])
def test_meta_parts_are_split_as_meta_splits_them(model_dir, equal_dirs, tmp_path, num_parts, vocab_size):
    source = model_dir(vocab_size=vocab_size)
    round_trip(source, tmp_path / "meta", tmp_path / "back", "meta", num_parts=num_parts)
    assert equal_dirs(source, tmp_path / "back") == []
    parts = [torch.load(file, weights_only=True) for file in sorted((tmp_path / "meta").glob("consolidated.*.pth"))]
    assert len(parts) == num_parts
    shapes = {name.replace("layers.0.", ""): tuple(tensor.shape) for name, tensor in parts[-1].items()}
    rows, columns = 32 // num_parts, 32
    assert shapes["attention.wq.weight"] == (rows, columns)
    assert shapes["attention.wk.weight"] == (rows // 2, columns)
    assert shapes["attention.wo.weight"] == (columns, rows)
    assert shapes["feed_forward.w1.weight"] == shapes["feed_forward.w3.weight"] == (48 // num_parts, 32)
    assert shapes["feed_forward.w2.weight"] == (32, 48 // num_parts)
    assert shapes["output.weight"] == (vocab_size // num_parts, 32)
    assert shapes["norm.weight"] == shapes["attention_norm.weight"] == (32,)
    llama3 = vocab_size >= 100_000
    assert shapes["tok_embeddings.weight"] == (
        (vocab_size // num_parts, 32) if llama3 else (vocab_size, 32 // num_parts)
    )


@pytest.mark.parametrize("to", ["meta", "torchtune"])
def test_heads_may_be_wider_than_hidden_size_over_heads(tmp_path, equal_dirs, to):
    """torchtune's way back to Hugging Face is wrong there; ours must not be."""
    transformers = pytest.importorskip("transformers")
    family = {"meta": "Mistral", "torchtune": "Gemma"}[to]  # whose loaders read head_dim
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    getattr(transformers, f"{family}ForCausalLM")(settings).save_pretrained(tmp_path / "hf")
    round_trip(tmp_path / "hf", tmp_path / "deep" / "er" / "between", tmp_path / "back", to)
    assert equal_dirs(tmp_path / "hf", tmp_path / "back") == []


def interleaved_logits(weights, ids, *, names, heads, kv_heads, eps, theta):
    """A Llama that rotates neighbouring pairs, written from the papers: what Meta's and torchtune's weights are for."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[name]

    def rotate(x):  # [s, h, d] as complex pairs
        angles = torch.outer(torch.arange(x.shape[0]), theta ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones(()), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    x, length = weights[names["embed"]][ids], len(ids)
    for layer in range(2):
        get = lambda key, layer=layer: weights[f"layers.{layer}.{names[key]}"]  # noqa: E731
        h = norm(x, f"layers.{layer}.{names['norm1']}")
        q, k, v = (F.linear(h, get(key)).view(length, -1, 8) for key in ("q", "k", "v"))
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
        scores += torch.full((length, length), -torch.inf).triu(1)
        x = x + F.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), get("o"))
        h = norm(x, f"layers.{layer}.{names['norm2']}")
        x = x + F.linear(F.silu(F.linear(h, get("gate"))) * F.linear(h, get("up")), get("down"))
    return F.linear(norm(x, names["norm"]), weights["output.weight"])


META = {"embed": "tok_embeddings.weight", "norm": "norm.weight", "norm1": "attention_norm.weight",
        "norm2": "ffn_norm.weight",
        "q": "attention.wq.weight", "k": "attention.wk.weight", "v": "attention.wv.weight", "o": "attention.wo.weight",
        "gate": "feed_forward.w1.weight", "down": "feed_forward.w2.weight", "up": "feed_forward.w3.weight"}  # fmt: skip
TORCHTUNE = {"embed": "tok_embeddings.weight", "norm": "norm.scale", "norm1": "sa_norm.scale",
             "norm2": "mlp_norm.scale",
             "q": "attn.q_proj.weight", "k": "attn.k_proj.weight", "v": "attn.v_proj.weight",
             "o": "attn.output_proj.weight", "gate": "mlp.w1.weight", "down": "mlp.w2.weight",
             "up": "mlp.w3.weight"}  # fmt: skip


@pytest.mark.parametrize(
    ("to", "file", "names"), [("meta", "consolidated.00.pth", META), ("torchtune", "torchtune_model_0.pt", TORCHTUNE)]
)
def test_converted_weights_give_transformers_logits(tmp_path, to, file, names):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    tt_ckpt.convert(tmp_path / "hf", tmp_path / "out", to)
    weights = torch.load(tmp_path / "out" / file, weights_only=True)
    ids = torch.randint(0, 65, (9,))
    with torch.no_grad():
        ours = interleaved_logits(weights, ids, names=names, heads=4, kv_heads=2, eps=1e-3, theta=5000.0)
        assert torch.allclose(ours, model(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


# ---- torchtune's directories, version by version ---------------------------------------------------------------------

LAYOUTS = {  # files that 0.1.0, 0.1.1, 0.3.1, 0.4.0, 0.5.0 and 0.6.1 leave behind, seen by running them
    "0.1 to 0.4, torchtune": ["torchtune_model_0.pt", "torchtune_model_1.pt", "recipe_state.pt", "adapter_1.pt"],
    "0.5, torchtune": ["epoch_0/ft-model-00001-of-00001.bin", "epoch_1/ft-model-00001-of-00001.bin",
                       "epoch_1/adapter_model.pt", "recipe_state/recipe_state.pt"],
    "0.6, torchtune": ["epoch_0/model-00001-of-00001.bin", "epoch_1/model-00001-of-00001.bin",
                       "recipe_state/recipe_state.pt"],
    "0.1 to 0.4, meta": ["meta_model_0.pt", "meta_model_1.pt", "recipe_state.pt"],
    "0.5, meta": ["epoch_0/ft-model-00001-of-00001.bin", "epoch_1/ft-model-00001-of-00001.bin"],
    "0.1 to 0.4, hf": ["hf_model_0001_0.pt", "hf_model_0002_0.pt", "hf_model_0001_1.pt", "hf_model_0002_1.pt",
                       "adapter_1.pt", "adapter_model.bin", "recipe_state.pt"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_torchtune_is_read_newest_epoch_first(model_dir, equal_dirs, tmp_path, layout):
    source = model_dir()
    kind = layout.split(", ")[1]
    if kind == "hf":
        state = load_file(source / "model.safetensors")
    else:
        tt_ckpt.convert(source, tmp_path / "whole", kind)
        state = torch.load(next((tmp_path / "whole").glob("*.p*t*")), weights_only=True)
    run, keys = tmp_path / "run", sorted(state)
    for name in LAYOUTS[layout]:
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        newest = "_1." in name or "epoch_1" in name
        half = [keys[::2], keys[1::2]][("_0002_" in name)] if kind == "hf" else keys
        if "adapter" in name or "recipe" in name:
            torch.save({"optimizer": {"lr": 1}, "seed": 3}, file)
        else:
            torch.save({key: state[key] if newest else torch.zeros_like(state[key]) for key in half}, file)
    report = tt_ckpt.convert(run, tmp_path / "back", "hf", allow_pickle=True, config=source)
    assert report.source_format == kind
    assert report.epochs == [0, 1]
    assert equal_dirs(source, tmp_path / "back") == []


def test_a_config_is_asked_for_where_heads_cannot_be_told(model_dir, tmp_path):
    tt_ckpt.convert(model_dir(), tmp_path / "tune", "torchtune")
    (tmp_path / "tune" / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json, which states the number of heads; give config=DIR"):
        tt_ckpt.convert(tmp_path / "tune", tmp_path / "back", "hf", allow_pickle=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_mistrals_own_safetensors_need_no_pickle(model_dir, tmp_path, sharded):
    source = model_dir(model_type="mistral", sliding_window=8)
    tt_ckpt.convert(source, tmp_path / "meta", "meta")
    published = tmp_path / "published"
    published.mkdir()
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    if sharded:
        for i in (1, 2):
            part = {name: state[name] for name in sorted(state)[i - 1 :: 2]}
            save_file(part, published / f"consolidated-0000{i}-of-00002.safetensors")
    else:
        save_file(state, published / "consolidated.safetensors")
    (published / "params.json").write_bytes((tmp_path / "meta" / "params.json").read_bytes())
    report = tt_ckpt.convert(published, tmp_path / "back", "hf")
    assert report.model_type == "mistral"
    assert tt_ckpt.read_config(tmp_path / "back")["sliding_window"] == 8
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    if sharded:
        (published / "consolidated-00001-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="1 of 2 files missing: consolidated-00001-of-00002.safetensors"):
            tt_ckpt.convert(published, tmp_path / "other", "hf")


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_hugging_face_files_become_safetensors(model_dir, tmp_path, sharded):
    source = model_dir(tie_word_embeddings=True)
    state, old = load_file(source / "model.safetensors"), tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((source / "config.json").read_bytes())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = list(state)
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        parts = {"pytorch_model.bin": names}
    for file, keys in parts.items():
        torch.save({key: state[key] for key in keys}, old / file)
    tt_ckpt.convert(old, tmp_path / "new", "hf", allow_pickle=True)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    if sharded:
        (old / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(FileNotFoundError, match="1 of 2 files missing: pytorch_model-00002"):
            tt_ckpt.convert(old, tmp_path / "newer", "hf", allow_pickle=True)


# ---- options, reports and refusals -----------------------------------------------------------------------------------


def test_the_report_is_plain_data(model_dir, tmp_path):
    seen = []
    report = tt_ckpt.convert(
        model_dir(), tmp_path / "out", "meta", progress=lambda done, total: seen.append((done, total))
    )
    plain = json.loads(json.dumps(dataclasses.asdict(report)))
    assert plain["num_tensors"] == 30
    assert plain["num_bytes"] == 4 * plain["num_parameters"]
    assert plain["dtypes"] == ["float32"]
    assert plain["verified"] is True
    assert "consolidated.00.pth" in plain["files"]
    assert seen[-1] == (2 * report.num_bytes, 2 * report.num_bytes)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_names_lose_the_prefix_of_a_wrapper(model_dir, tiny, tmp_path, equal_models, prefix):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"all names begin with .* saved with the model: tt convert"):
        tt_ckpt.load_weights(tiny(), source)
    tt_ckpt.convert(source, tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    lora = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    lora["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)
    save_file(lora, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lora_A.weight belongs to an adapter that was saved with its base; merge it"):
        tt_ckpt.convert(source, tmp_path / "other")


def test_paths_may_begin_with_the_home_folder(model_dir, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = model_dir()
    tt_ckpt.convert(source, "~/converted")
    tt_ckpt.save_hf(tiny(), "~/saved", config={})
    tt_ckpt.TrainCheckpoint("~/run").save(1, tensors={}, state={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "run", "saved", "source"]


def test_a_dry_run_writes_nothing(model_dir, tmp_path):
    report = tt_ckpt.convert(model_dir(), tmp_path / "deep" / "out", "meta", dry_run=True)
    assert not report.verified
    assert report.num_tensors == 30
    assert not (tmp_path / "deep").exists()


def test_dtype_casts(model_dir, tmp_path):
    source = model_dir()
    tt_ckpt.convert(source, tmp_path / "out", "hf", dtype=torch.bfloat16)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)
    assert tt_ckpt.read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_values_that_a_dtype_cannot_hold_are_an_error(model_dir, tiny, tmp_path):
    model = tiny()
    model.model.norm.weight.data[:2] = 1e6
    tt_ckpt.save_hf(model, tmp_path / "wide", config=tiny().config.__dict__)
    with pytest.raises(ValueError, match=r"model.norm.weight: 2 values overflow float16"):
        tt_ckpt.convert(tmp_path / "wide", tmp_path / "out", "hf", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_max_shard_size_splits(model_dir, tmp_path):
    tt_ckpt.convert(model_dir(), tmp_path / "out", "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_pickles_need_to_be_allowed(model_dir, tmp_path):
    tt_ckpt.convert(model_dir(), tmp_path / "meta", "meta")
    with pytest.raises(ValueError, match=r"consolidated.00.pth: a pickle, which can run code.*--allow-pickle"):
        tt_ckpt.convert(tmp_path / "meta", tmp_path / "back", "hf")


def test_existing_weights_are_kept_unless_told(model_dir, tmp_path):
    source = model_dir()
    tt_ckpt.convert(source, tmp_path / "out", "meta")
    with pytest.raises(FileExistsError, match="already contains consolidated.00.pth"):
        tt_ckpt.convert(source, tmp_path / "out", "torchtune")
    tt_ckpt.convert(source, tmp_path / "out", "torchtune", overwrite=True)
    assert not list((tmp_path / "out").glob("consolidated*"))


@pytest.mark.parametrize(("fields", "options", "message"), [
    ({}, {"to": "gguf"}, "expected one of hf, meta, torchtune, got 'gguf'"),
    ({"model_type": "gpt2"}, {"to": "torchtune"}, "'gpt2' has no torchtune format; families that do: llama"),
    ({"model_type": "gemma"}, {"to": "meta"}, "'gemma' has no Meta format; families that do: llama, mistral"),
    ({}, {"to": "meta", "num_parts": 3}, "num_parts 3 does not divide the heads"),
    ({}, {"to": "meta", "num_parts": 0}, "num_parts 0 does not divide"),
    ({"num_attention_heads": "4"}, {"to": "meta"}, "num_attention_heads: expected a whole number above 0, found '4'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, {"to": "meta"}, "rope type 'yarn' cannot be expressed"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, {"to": "torchtune"}, "rope type 'linear' cannot"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 4096}},
     {"to": "meta", "dry_run": True}, r"rope original_max_position_embeddings 4096 \(only 8192\)"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "high_freq_factor": 2.0}}, {"to": "torchtune"},
     "rope high_freq_factor 2.0"),
    ({"model_type": "mistral", "rope_scaling": {"type": "llama3", "factor": 8}}, {"to": "meta"}, "'llama3' cannot"),
    ({"model_type": "mistral", "sliding_window": "16"}, {"to": "meta"}, "sliding_window: expected a whole number"),
    ({"model_type": "mistral", "sliding_window": 16}, {"to": "torchtune"}, "sliding_window 16 cannot be expressed"),
    ({"model_type": "mistral", "max_position_embeddings": 8192}, {"to": "torchtune"}, "sliding_window 4096 cannot"),
    ({"model_type": "gemma", "head_dim": 8, "hidden_act": "gelu"}, {"to": "torchtune"},
     "config.json: tie_word_embeddings false of gemma cannot be expressed"),
    ({"model_type": "qwen2", "use_sliding_window": True}, {"to": "torchtune"}, "use_sliding_window True cannot"),
    ({"attention_bias": True, "mlp_bias": True}, {"to": "meta"}, "mlp_bias True, attention_bias True cannot be"),
    ({"hidden_act": "gelu"}, {"to": "meta"}, "hidden_act gelu cannot be expressed in the meta format"),
    ({"head_dim": 16}, {"to": "meta"}, "head_dim 16 beside hidden_size 32 and 4 heads cannot be expressed"),
    ({"head_dim": 16, "final_logit_softcapping": 30.0}, {"to": "torchtune"},
     "final_logit_softcapping 30.0, head_dim 16"),
    ({"vocab_size": 64}, {"to": "hf"}, "vocab_size 64, but model.embed_tokens.weight has 65 rows; set"),
    ({"partial_rotary_factor": 0.5}, {"to": "torchtune"}, "partial_rotary_factor 0.5 cannot be expressed"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, {"to": "meta"}, "of several kinds"),
    ({"layer_types": 3}, {"to": "meta"}, "layer_types: expected a list, found 3"),
    ({"model_type": "gemma2", "head_dim": 8, "layer_types": ["full_attention"] * 3}, {"to": "torchtune"},
     "layer_types in another order.*tie_word_embeddings false of gemma2"),
])  # fmt: skip
def test_what_cannot_be_converted_is_explained(model_dir, tmp_path, fields, options, message):
    source = model_dir()
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tt_ckpt.convert(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_unknown_tensor_is_named_with_the_closest_known(model_dir, tmp_path):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.q_prj.weight"] = weights.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(weights, source / "model.safetensors")
    message = r"unknown tensor model.layers.1.self_attn.q_prj.weight in a torchtune .*layers.N.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=message):
        tt_ckpt.convert(source, tmp_path / "out", "torchtune")


def test_tied_tensors_that_differ_are_refused(model_dir, tmp_path):
    source = model_dir(tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(
        ValueError, match="lm_head.weight differ .*but the model ties them: .*tie_word_embeddings to false"
    ):
        tt_ckpt.convert(source, tmp_path / "out", "hf")


@pytest.mark.parametrize("to", ["hf", "meta", "torchtune"])
def test_a_bit_that_flips_while_writing_is_found_by_reading_back(model_dir, tmp_path, monkeypatch, to):
    from tt_ckpt import safetensors_file
    from tt_ckpt.formats import pickles

    source = model_dir()
    original, written = safetensors_file.announced, []

    def flipping(*words):
        for data in original(*words):
            written.append(bytearray(data))
            written[-1][3] ^= 8 * (len(written) == 5)
            yield memoryview(written[-1])

    monkeypatch.setattr(safetensors_file, "announced", flipping)
    monkeypatch.setattr(pickles, "announced", flipping)
    with pytest.raises(ValueError, match="reading back: .* differs from what was written"):
        tt_ckpt.convert(source, tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_the_rotary_layouts_are_inverse_and_pair_as_documented():
    weight = torch.arange(2 * 6 * 3).reshape(12, 3)
    there = to_interleaved(weight, 2)
    assert torch.equal(to_half_split(there, 2), weight)
    assert there[:6, 0].tolist() == [weight[row, 0] for row in (0, 3, 1, 4, 2, 5)]
    bias = torch.arange(12)
    assert torch.equal(to_half_split(to_interleaved(bias, 2), 2), bias)
    with pytest.raises(ValueError, match="do not divide into 5 heads"):
        to_interleaved(weight, 5)


def test_renames_carry_all_numbers_both_ways():
    rename = Rename({"a.{}.experts.{}.w": "b.{}.{}.x"}, what="a test")
    assert rename.there("a.12.experts.3.w") == "b.12.3.x"
    assert rename.back("b.12.3.x") == "a.12.experts.3.w"
    with pytest.raises(ValueError, match="unknown tensor a.1.expert.2.w in a test; did you mean a.N.experts.N.w"):
        rename.there("a.1.expert.2.w")


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_config_that_is_a_link_out_of_its_folder_is_refused(model_dir, tmp_path, name):
    """Else a cloned repository could have a file of the user's copied into what is uploaded next."""
    source = model_dir()
    (tmp_path / "secret.json").write_text('{"auth": "x"}')
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="a link that leaves its folder"):
        tt_ckpt.convert(source, tmp_path / "out", "hf")
