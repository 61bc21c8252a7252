import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tt_ckpt


def test_a_model_is_filled_with_the_files_values(tiny, model_dir, equal_models):
    source, model = model_dir(seed=1), tiny(2)
    tt_ckpt.load_weights(model, source)
    assert equal_models(model, tiny(1))
    assert not equal_models(model, tiny(2))


def test_a_meta_model_is_materialised_in_the_files_dtype(tiny, model_dir, equal_models):
    source, model = model_dir(dtype=torch.bfloat16), tiny(device="meta")
    for parameter in model.model.norm.parameters():
        parameter.requires_grad_(False)
    tt_ckpt.load_weights(model, source)
    assert equal_models(model, tiny(1, dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_what_was_loaded_is_no_view_of_the_file(tiny, model_dir):
    source, model = model_dir(), tiny(device="meta")
    tt_ckpt.load_weights(model, source)
    maps = Path("/proc/self/maps").read_text() if os.path.exists("/proc/self/maps") else ""
    assert str(source) not in maps
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert load_file(source / "model.safetensors")["lm_head.weight"].abs().sum() > 0


def test_dtype_decides_for_meta_and_real_models(tiny, model_dir):
    source = model_dir()
    for model in (tiny(device="meta"), tiny(2)):
        tt_ckpt.load_weights(model, source, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    kept = tiny(2, dtype=torch.float64)
    tt_ckpt.load_weights(kept, source)
    assert {p.dtype for p in kept.parameters()} == {torch.float64}


def test_device_decides_where_parameters_live(tiny, model_dir):
    source, model = model_dir(), tiny()
    tt_ckpt.load_weights(model, source, device="meta", check_finite=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_same_parameter_objects_stay_for_optimizers(tiny, model_dir):
    source, model = model_dir(), tiny(2)
    before = [id(p) for p in model.parameters()]
    tt_ckpt.load_weights(model, source, dtype=torch.bfloat16)
    assert [id(p) for p in model.parameters()] == before


def test_a_cast_is_told(tiny, model_dir, caplog):
    with caplog.at_level(logging.INFO, "tt_ckpt"):
        tt_ckpt.load_weights(tiny(), model_dir(), dtype=torch.bfloat16)
    assert "30 tensors cast from torch.float32 to torch.bfloat16" in caplog.text


def test_progress_ends_at_the_whole(tiny, model_dir):
    seen = []
    tt_ckpt.load_weights(tiny(), model_dir(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)
    assert len(seen) == 30


def test_tied_models_take_files_with_and_without_the_output(tiny, model_dir, equal_models):
    tied = model_dir(tie_word_embeddings=True)
    model = tiny(2, tie_word_embeddings=True)
    tt_ckpt.load_weights(model, tied)
    weights = load_file(tied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tied / "model.safetensors")
    again = tiny(3, tie_word_embeddings=True)
    tt_ckpt.load_weights(again, tied)
    assert equal_models(model, again)
    weights["lm_head.weight"] += 1
    save_file(weights, tied / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differ.*ties them: .* set tie_word_embeddings to false"):
        tt_ckpt.load_weights(again, tied)
    weights["lm_head.weight"] = torch.ones(64, 32)  # the embedding alone was resized
    save_file(weights, tied / "model.safetensors")
    with pytest.raises(ValueError, match=r"differ \(\[65, 32\] and \[64, 32\]\).*save the model again"):
        tt_ckpt.load_weights(again, tied)
    larger = tiny(3, tie_word_embeddings=True, vocab_size=72)
    with pytest.raises(
        ValueError, match=r"has \[72, 32\], the file \[65, 32\].* which lm_head shares .*set vocab_size to 65"
    ):
        tt_ckpt.load_weights(larger, tied)


def test_parameters_shared_by_two_modules_stay_shared(tiny, model_dir):
    source = model_dir(tie_word_embeddings=True)
    for device in ("cpu", "meta"):
        model = tiny(2, device=device)
        model.lm_head.weight = model.model.embed_tokens.weight
        tt_ckpt.load_weights(model, source)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, load_file(source / "model.safetensors")["model.embed_tokens.weight"])


def test_the_rotary_frequencies_of_old_files_are_passed_over(tiny, model_dir):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, source / "model.safetensors")
    tt_ckpt.load_weights(tiny(), source)


def test_adapter_parameters_are_left_alone(tiny, model_dir):
    class Adapted(nn.Linear):
        def __init__(self, old):
            super().__init__(old.in_features, old.out_features, bias=False)
            self.lora_A = nn.Parameter(torch.full((2, old.in_features), 7.0))

        def adapter_params(self):
            return ["lora_A"]

    source, model = model_dir(), tiny(2)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    tt_ckpt.load_weights(model, source)
    expected = load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(attention.q_proj.weight, expected)
    assert bool((attention.q_proj.lora_A == 7).all())


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_a_tensor_of_many_pieces_is_cast_as_a_whole_is(tmp_path, monkeypatch, to):
    monkeypatch.setattr("tt_ckpt.safetensors_file._CAST_BYTES", 64)
    values = torch.randn(37, 5)
    save_file({"weight": values, "bias": torch.randn(37)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Linear(5, 37)
    tt_ckpt.load_weights(model, tmp_path, dtype=to)
    assert torch.equal(model.weight, values.to(to))


@pytest.mark.parametrize("accident", ["written over", "replaced", "cut short"])
def test_an_accident_to_the_file_after_loading_does_not_touch_the_weights(tiny, model_dir, equal_models, accident):
    source, model = model_dir(seed=1), tiny(device="meta")
    tt_ckpt.load_weights(model, source)
    file = source / "model.safetensors"
    if accident == "cut short":
        os.truncate(file, 0)  # a map of the file would end the process here
    elif accident == "written over":
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    else:
        save_file({"other": torch.zeros(1)}, source / "new")
        (source / "new").replace(file)
    assert equal_models(model, tiny(1))


def test_a_parameter_with_strides_is_filled_in_its_own_memory(tmp_path):
    values = torch.randn(4, 3)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, 4).T)
    before = model.weight.data_ptr()
    tt_ckpt.load_weights(model, tmp_path)
    assert torch.equal(model.weight, values)
    assert model.weight.data_ptr() == before
    assert model.weight.stride() == (1, 4)


def test_a_file_that_is_cut_while_it_is_read_is_our_error(tiny, model_dir):
    source = model_dir()
    path = source / "model.safetensors"

    def cut(done, total):
        os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(ValueError, match=r"model.safetensors: cut short while it was read; download it again"):
        tt_ckpt.load_weights(tiny(), source, progress=cut)


def test_a_module_that_loads_its_own_base_is_given_the_tensors(tiny, model_dir):
    class Quantized(nn.Linear):
        given = None

        def load_base_(self, name, tensor):
            self.given = (name, tensor.clone())

    source, model = model_dir(), tiny(2)
    attention = model.model.layers[1].self_attn
    attention.o_proj = Quantized(32, 32, bias=False)
    before = attention.o_proj.weight.clone()
    tt_ckpt.load_weights(model, source, dtype=torch.bfloat16)
    name, tensor = attention.o_proj.given
    assert name == "weight"
    assert tensor.dtype == torch.bfloat16
    expected = load_file(source / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(tensor, expected.bfloat16())
    assert torch.equal(before, attention.o_proj.weight)


class Fused(nn.Module):
    """Two keys of the files in one parameter, as a family with a fused layout declares it."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(8, 4))

    def hf_sources(self, name):
        return ["gate.weight", "up.weight"]

    def join_from_hf(self, name, parts):
        return torch.cat(parts)

    def split_for_hf(self, name, tensor):
        gate, up = tensor.chunk(2)
        return {"gate.weight": gate, "up.weight": up}


def test_a_stack_of_experts_is_split_once_and_not_for_each_of_its_experts(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.calls = nn.Parameter(torch.randn(30, 2, 3)), nn.Parameter(torch.randn(30, 3, 2)), 0

        def split_for_hf(self, name, tensor):
            self.calls += 1
            return {f"experts.{at}.{name}.weight": one for at, one in enumerate(tensor)}

    model = Experts()
    tt_ckpt.save_hf(model, tmp_path / "out", config={})
    assert model.calls == 2 * 2  # to know the names, and to write and compare
    assert torch.equal(tt_ckpt.open_tensors(tmp_path / "out")["experts.7.up.weight"], model.up[7])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_that_is_on_disk_as_in_the_model_is_read_so(tmp_path, device):
    """transformers 5 can write the experts of a mixture stacked, as it holds them (save_original_format=False)."""
    whole = torch.randn(8, 4).bfloat16()
    save_file({"gate_up": whole}, tmp_path / "model.safetensors")
    with torch.device(device):
        model = Fused()
    tt_ckpt.load_weights(model, tmp_path)
    assert torch.equal(model.gate_up.bfloat16(), whole)
    tt_ckpt.save_hf(model, tmp_path / "out", config={}, dtype=tt_ckpt.tensor_dtypes(tmp_path))
    assert tt_ckpt.tensor_dtypes(tmp_path / "out") == {"gate.weight": torch.bfloat16, "up.weight": torch.bfloat16}
    save_file(
        {"gate_up": whole, "gate.weight": whole[:4].clone(), "up.weight": whole[4:].clone()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="gate_up"):  # two copies that nothing decides between
        tt_ckpt.load_weights(model, tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_parameters_are_joined_and_split_over_shards(tmp_path, device):
    gate, up = torch.randn(4, 4), torch.randn(4, 4)
    save_file({"gate.weight": gate}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"up.weight": up}, tmp_path / "model-00002-of-00002.safetensors")
    where = {"gate.weight": "model-00001-of-00002.safetensors", "up.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with torch.device(device):
        model = Fused()
    tt_ckpt.load_weights(model, tmp_path)
    assert torch.equal(model.gate_up, torch.cat([gate, up]))
    tt_ckpt.save_hf(model, tmp_path / "out", config={})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["gate.weight"], gate)
    assert torch.equal(written["up.weight"], up)


def test_a_fused_parameter_with_a_wrong_part_is_named(tmp_path):
    save_file({"gate.weight": torch.ones(4, 4), "up.weight": torch.ones(4, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="gate_up: the model has"):
        tt_ckpt.load_weights(Fused(), tmp_path)


def test_not_a_number_is_found_and_counted(tiny, model_dir):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][3, :2] = float("nan")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 tensors are not finite: lm_head.weight \(2 of 2080 values\)"):
        tt_ckpt.load_weights(tiny(), source)
    tt_ckpt.load_weights(tiny(), source, check_finite=False)


def test_values_that_do_not_fit_the_dtype_are_found(tiny, model_dir):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="1 value overflows float16"):
        tt_ckpt.load_weights(tiny(), source, dtype=torch.float16)


def test_infinities_that_cancel_are_found(tiny, model_dir):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][3, :2] = torch.tensor([float("inf"), float("-inf")])
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight \(2 of 2080 values\)"):
        tt_ckpt.load_weights(tiny(), source)


def test_large_finite_values_are_no_error(tiny, model_dir):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][:] = 3e38  # the sum overflows, no value does
    save_file(weights, source / "model.safetensors")
    tt_ckpt.load_weights(tiny(), source)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"model.layers.0.self_attn.masked_bias": torch.ones(1)},
            r"1 unexpected \(model.layers.0.self_attn.masked_bias\); use the weights",
        ),
        (
            {f"model.layers.{n}.mlp.up_proj.weight_scale": torch.ones(1) for n in range(3)},
            r"3 unexpected \(model.layers.\*.mlp.up_proj.weight_scale: 3 tensors\); use the weights",
        ),
        (
            {f"model.layers.{n}.mlp.up_proj.weight": None for n in range(3)},
            r"3 tensors missing \(model.layers.\*.mlp.up_proj.weight: 3 tensors\); use the weights",
        ),
    ],
)
def test_single_tensors_of_layers_are_named_and_no_number_of_layers_is_blamed(tiny, model_dir, change, expected):
    source = model_dir()
    weights = load_file(source / "model.safetensors") | change
    save_file({key: value for key, value in weights.items() if value is not None}, source / "model.safetensors")
    with pytest.raises(ValueError, match=expected):
        tt_ckpt.load_weights(tiny(), source)


@pytest.mark.parametrize(
    ("model_fields", "expected"),
    [
        (
            {"num_hidden_layers": 4},
            r"9 tensors missing \(model.layers.3.\*: 9 tensors\).*num_hidden_layers=4, .* contain 3",
        ),
        (
            {"num_hidden_layers": 2},
            r"9 unexpected \(model.layers.2.\*: 9 tensors\).*num_hidden_layers=2, the files contain 3",
        ),
        ({"vocab_size": 64}, r"config.vocab_size=64 vs embedding rows 65: set vocab_size to 65 in config.json"),
        ({"num_key_value_heads": 4}, r"6 of another shape.*config.num_key_value_heads=4 vs 2"),
        ({"intermediate_size": 50}, r"config.intermediate_size=50 vs gate_proj rows 48"),
        ({"hidden_size": 48}, r"config.hidden_size=48 vs embedding width 32"),
        ({"tie_word_embeddings": True}, r"lm_head.weight differ \(both \[65, 32\]\), but the model ties them"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(tiny, model_dir, model_fields, expected):
    source, model = model_dir(), tiny(2, **model_fields)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=expected) as caught:
        tt_ckpt.load_weights(model, source)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "nothing may be copied"


def test_names_without_their_prefix_are_explained(tiny, model_dir):
    source = model_dir()
    weights = {key.removeprefix("model."): value for key, value in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"differ by the prefix 'model.'"):
        tt_ckpt.load_weights(tiny(), source)


def test_a_renamed_tensor_is_suggested(tiny, model_dir):
    source = model_dir()
    weights = load_file(source / "model.safetensors")
    weights["model.norms.weight"] = weights.pop("model.norm.weight")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"is model.norms.weight meant to be model.norm.weight"):
        tt_ckpt.load_weights(tiny(), source)


@pytest.mark.parametrize(
    "settings", [{}, None, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}]
)
def test_settings_of_bitsandbytes_that_quantize_nothing_are_passed_over(tiny, model_dir, settings):
    tt_ckpt.load_weights(tiny(), model_dir(quantization_config=settings))


def test_quantized_repositories_are_refused(tiny, model_dir):
    source = model_dir(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"config.json: quantization_config: bitsandbytes; only unquantized"):
        tt_ckpt.load_weights(tiny(), source)
    mlx = model_dir("mlx", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(ValueError, match=r"quantization_config: MLX; only unquantized"):
        tt_ckpt.load_weights(tiny(), mlx)


def test_a_buffer_left_on_meta_is_named(tiny, model_dir):
    source, model = model_dir(), tiny(device="meta")
    model.model.register_buffer("cos", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"buffer model.cos is on the meta device"):
        tt_ckpt.load_weights(model, source)


def test_persistent_buffers_are_loaded(tmp_path):
    model = nn.Module()
    model.register_buffer("scale", torch.zeros(3))
    save_file({"scale": torch.ones(3)}, tmp_path / "model.safetensors")
    tt_ckpt.load_weights(model, tmp_path)
    assert bool((model.scale == 1).all())


def test_compiled_models_keep_their_names(tiny, model_dir, equal_models):
    source, model = model_dir(), tiny(2)
    tt_ckpt.load_weights(torch.compile(model), source)
    assert equal_models(model, tiny(1))


@pytest.mark.parametrize("kind", ["llama", "tied", "sharded"])
def test_transformers_models_load_with_equal_logits(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(settings).eval()
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "sharded" else "5GB")
    model = transformers.LlamaForCausalLM(settings).eval()
    tt_ckpt.load_weights(model, tmp_path)
    ids = torch.randint(0, 65, (2, 9))
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert bool(list(tmp_path.glob("*.index.json"))) == (kind == "sharded")


def test_every_message_is_one_line_with_the_path(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))) as caught:
        tt_ckpt.load_weights(tiny(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_word_beside_a_folder_of_nearly_that_name_is_a_typo_not_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "llama32").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean llama32"):
        tt_ckpt.resolve("lama32")


def test_a_path_that_looks_like_a_hub_id_is_asked_for_there_and_then_compared_with_folders(tmp_path, monkeypatch):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for error in (FileNotFoundError, ConnectionError):

        def fails(name, error=error):
            raise error(f"{name}: not there")

        monkeypatch.setattr("tt_ckpt.hub.download.snapshot", fails)
        with pytest.raises(error, match="^runs/frist: not there; did you mean runs/first"):
            tt_ckpt.resolve("runs/frist")
        with pytest.raises(error, match="^some/thing: not there$"):
            tt_ckpt.resolve("some/thing")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_whole_numbers_in_place_of_weights_are_refused_before_anything_is_copied(tiny, model_dir, device):
    source = model_dir()
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, source / "model.safetensors")
    model = tiny(5, device=device)
    with pytest.raises(ValueError, match=r"model.norm.weight: the model has torch.float32, the file torch.int8"):
        tt_ckpt.load_weights(model, source)
    assert model.model.embed_tokens.weight.device.type == device
    if device == "cpu":
        assert torch.equal(model.model.embed_tokens.weight, tiny(5).model.embed_tokens.weight)


def test_fractions_are_not_cut_off_for_an_integer_buffer(tmp_path):
    model = torch.nn.Module()
    model.register_buffer("position", torch.zeros(3, dtype=torch.int64))
    save_file({"position": torch.tensor([0.5, 1.5, 2.5])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"position: the model has torch.int64, the file torch.float32"):
        tt_ckpt.load_weights(model, tmp_path)
