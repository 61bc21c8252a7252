"""tt quantize: what is written is what transformers computes, is as small as it says, and is trusted in nothing."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tt_ckpt
import tt_models
import tt_train
from tt_train import compose
from tt_train.config import QuantizationSection
from tt_train.errors import ConfigError, TrainingError
from tt_train.inputs.fake_quantize import fake_quantize_
from tt_train.models import quantize, verify
from tt_train.models.quality import agreement
from tt_train.models.quantization_plan import Asked, plan_of
from tt_train.models.quantize import quantize_run
from tt_train.quantized import stored, trial
from tt_train.quantized import torchao as quantized_torchao
from tt_train.quantized.formats import ALIASES, FORMATS, find_format
from tt_train.recipes import qat, sft

IDS = torch.arange(40).view(2, 20) * 7 % 400
HERE = [name for name in FORMATS if name != "fp8-dynamic"]


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory, model_dir):
    """A model whose sizes 4-bit kernels take, with a tied output projection, in bf16."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    changes = {"hidden_size": 64, "head_dim": 16, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config = json.loads((model_dir / "config.json").read_text()) | changes
    torch.manual_seed(7)
    model = tt_models.build(tt_models.config_from_hf(config), dtype=torch.bfloat16)
    tt_ckpt.save_hf(model, folder, config=config, source=model_dir)
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory, wide_dir):
    """``written(name)``: the model in a format, and the report; made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized") / name
            made[name] = folder, quantize_run(wide_dir, folder, to=name)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    monkeypatch.setattr("tt_train.models.quality.NEW_TOKENS", 4)


def logits(folder):
    with torch.no_grad():
        return tt_train.load(folder)[0](IDS)


def in_transformers(folder, **options):
    transformers = pytest.importorskip("transformers")

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


def metadata(folder, name="model.safetensors"):
    with safe_open(folder / name, framework="pt") as file:
        return file.metadata()


# ---- what other programs read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HERE if name != "int4"])
def test_transformers_computes_the_same_bits_from_the_directory(written, name):
    folder, _ = written(name)
    theirs = in_transformers(folder)
    assert type(theirs.model.layers[0].mlp.up_proj.weight).__name__ in ("Int8Tensor", "Float8Tensor",
                                                                       "IntxUnpackedToInt8Tensor")  # fmt: skip
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, logits(folder))


@pytest.mark.parametrize("name", HERE)
def test_the_config_is_the_one_that_transformers_writes(written, name):
    TorchAoConfig = pytest.importorskip("transformers").TorchAoConfig

    found = json.loads((written(name)[0] / "config.json").read_text())["quantization_config"]
    assert list(found["quant_type"]) == ["default"]
    theirs = TorchAoConfig.from_dict(found)
    assert json.loads(json.dumps(theirs.to_dict())) == found
    assert found["modules_to_not_convert"] == ["lm_head"]


def test_int4_is_torchaos_plain_tensor_two_weights_in_a_byte_low_half_first(written, wide_dir):
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    from torchao.quantization import Int4Tensor

    folder, report = written("int4")
    tensors = load_file(folder / "model.safetensors")
    read, left = unflatten_tensor_state_dict(tensors, metadata(folder))
    assert not left
    name = "model.layers.0.mlp.up_proj"
    weight = read[f"{name}.weight"]
    assert type(weight) is Int4Tensor
    assert weight.block_size == [1, 64] == [1, report["group_size"]]
    assert tensors[f"{name}._weight_qdata"].numel() * 2 == 64 * 64

    original = load_file(wide_dir / "model.safetensors")[f"{name}.weight"].float().numpy()
    packed = tensors[f"{name}._weight_qdata"].numpy().astype(np.int32)
    scale, zero = (tensors[f"{name}._weight_{part}"].float().numpy() for part in ("scale", "zero_point"))
    for row, column in [(0, 0), (0, 1), (5, 62), (63, 63)]:
        half = (packed[row, column // 2] >> 4 * (column % 2)) & 15
        value = (half - 16 if half > 7 else half) * scale[column // 64, row] + zero[column // 64, row]
        step = (original[row].max() - original[row].min()) / 15
        assert abs(value - original[row, column]) <= step / 2 + 2**-8 * abs(original[row]).max() * 9  # 9 of bf16


def test_int4_computes_what_its_matrices_stand_for(written):
    """torch's kernel in bf16 against fp64: 2 blocks of bf16 roundings of 2^-9."""
    folder, _ = written("int4")
    plain = tt_train.models.load.load_quantized(folder, device=torch.device("cpu"), as_dense=True)
    assert type(plain.model.layers[0].mlp.up_proj.weight) is torch.nn.Parameter
    with torch.no_grad():
        truth = plain.double()(IDS)
    assert (logits(folder) - truth).abs().max() < 2e-2 * truth.abs().max()


def test_a_directory_that_transformers_quantized_and_saved_is_read(tmp_path, wide_dir):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    TorchAoConfig = pytest.importorskip("transformers").TorchAoConfig

    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        folder = tmp_path / type(config).__name__
        theirs = in_transformers(wide_dir, quantization_config=TorchAoConfig(config))
        theirs.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(wide_dir / name, folder)
        with torch.no_grad():
            assert torch.equal(theirs(IDS).logits, logits(folder))


def test_every_shard_has_the_metadata_of_all_tensors(tmp_path, wide_dir, monkeypatch, written):
    """transformers merges the metadata of shards, so that the last list of names counts for all of them."""
    monkeypatch.setattr(quantize, "SHARD", "40KB")
    quantize_run(wide_dir, tmp_path / "out", to="int8")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(metadata(tmp_path / "out", name) == metadata(written("int8")[0]) for name in shards)
    with torch.no_grad():
        assert torch.equal(in_transformers(tmp_path / "out")(IDS).logits, logits(tmp_path / "out"))
    assert torch.equal(logits(tmp_path / "out"), logits(written("int8")[0]))


def test_the_tokenizer_the_template_and_the_settings_of_generation_are_beside_the_weights(written, wide_dir):
    names = {path.name for path in wide_dir.iterdir()} | {"quantization.json"}
    assert {path.name for path in written("int8")[0].iterdir()} == names


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_adapter_of_a_run_is_merged_first(tmp_path, words):
    run = sft.main(compose("sft", overrides=[*words, "adapter.rank=2", f"output_dir={tmp_path / 'run'}"]))
    tt_train.merge_run(run, tmp_path / "merged")
    quantize_run(run, tmp_path / "one", to="int8")
    quantize_run(tmp_path / "merged", tmp_path / "two", to="int8")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def qat_run(tmp_path, words, wide_dir):
    def make(*more):
        words_of_qat = [*words, f"model.path={wide_dir}", "max_steps=2", f"output_dir={tmp_path / 'run'}", *more]
        return qat.main(compose("qat", overrides=words_of_qat))

    return make


def test_a_qat_run_is_quantized_to_the_values_that_it_was_trained_with(tmp_path, qat_run):
    run, said = qat_run(), []
    report = quantize_run(run, tmp_path / "packed", tell=said.append)
    assert (report["format"], report["group_size"], report["rounded_as_trained"]) == ("int4", 32, True)
    quantize_run(run, tmp_path / "bytes", to="int4-unpacked")
    cpu = torch.device("cpu")
    one, two = (
        tt_train.models.load.load_quantized(tmp_path / n, device=cpu, as_dense=True) for n in ("packed", "bytes")
    )
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in pairs)  # in which the model computes
    trained, _ = tt_train.load(run, dtype=torch.bfloat16)
    fake_quantize_(trained, QuantizationSection())
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "bytes"), trained(IDS))
    assert not any("less accuracy" in line for line in said)


def test_a_qat_run_says_that_another_format_is_not_the_one_it_was_trained_for(tmp_path, qat_run):
    run, said = qat_run("quantization.activations=int8"), []
    assert quantize_run(run, tmp_path / "own")["format"] == "int8-dynamic-int4"
    quantize_run(run, tmp_path / "other", to="int8", tell=said.append)
    assert said[0].startswith("the run was trained for int8-dynamic-int4 in groups of 32, not for int8")


# ---- which layers ----------------------------------------------------------------------------------------------------


def meta_model(wide_dir, **changes):
    config = json.loads((wide_dir / "config.json").read_text()) | changes
    return tt_models.build(tt_models.config_from_hf(config), device="meta")


def test_layers_that_are_left_as_they_are_are_counted_and_named(wide_dir):
    plan = plan_of(meta_model(wide_dir, intermediate_size=96), Asked(format="int4", group_size=64))
    assert {name: why for name, why in plan.skipped.items() if name.startswith("model.layers.1.")} == {
        "model.layers.1.mlp.down_proj": "96 inputs, not a multiple of 64"
    }
    assert plan.skipped["lm_head"] == "tied to the embedding"
    assert len(plan.layers) == 12
    assert "2 left as they are (model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: 96 inputs" in str(plan)
    odd = plan_of(meta_model(wide_dir, intermediate_size=72), Asked(format="int4"))
    assert odd.group_size == 64  # fits the most layers
    assert odd.skipped["model.layers.0.mlp.up_proj"] == "72 outputs, not a multiple of 16"
    with pytest.raises(ConfigError, match="fits none of the 14 linear layers"):
        plan_of(meta_model(wide_dir, hidden_size=72, head_dim=12, intermediate_size=72), Asked(format="int4"))


def test_routers_and_stacked_experts_are_left_as_they_are(wide_dir):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    model = meta_model(wide_dir, **experts, architectures=["MixtralForCausalLM"])
    plan = plan_of(model, Asked(format="int8"))
    assert len(plan.layers) == 8  # of attention
    assert all("self_attn" in name for name in plan.layers)
    skipped = " ".join(plan.skipped)
    assert "experts" in skipped
    assert "gate" in skipped


def test_a_skipped_layer_stays_unquantized_in_transformers_too(tmp_path, wide_dir, model_dir):
    config = json.loads((wide_dir / "config.json").read_text()) | {"intermediate_size": 72}
    base = tmp_path / "base"
    tt_ckpt.save_hf(tt_models.build(tt_models.config_from_hf(config)), base, config=config, source=model_dir)
    report = quantize_run(base, tmp_path / "out", to="int4-unpacked")
    assert len(report["skipped"]) == 3
    theirs = in_transformers(tmp_path / "out")
    assert type(theirs.model.layers[0].mlp.down_proj.weight) is torch.nn.Parameter
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, logits(tmp_path / "out"))


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_beside_the_weights_has_figures_that_can_be_computed_again(tmp_path, wide_dir, rows_file):
    report = quantize_run(wide_dir, tmp_path / "out", to="int8", data=rows_file)
    kept = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert kept == {key: value for key, value in report.items() if key not in ("path", "dry_run")}
    tensors, dense = load_file(wide_dir / "model.safetensors"), {}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name.endswith("_weight_qdata"):
            scale = load_file(tmp_path / "out" / "model.safetensors")[name.replace("qdata", "scale")]
            dense[name.replace("_weight_qdata", "weight")] = tensor.float() * scale
    noise = sum((tensors[name].float() - weight).square().sum() for name, weight in dense.items())
    signal = sum(tensors[name].float().square().sum() for name in dense)
    assert kept["sqnr_db"] == pytest.approx(10 * torch.log10(signal / noise).item(), abs=0.05)
    assert kept["bytes_after"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert kept["layers"] == len(dense) == 14

    model, tokenizer = tt_train.load(tmp_path / "out")
    dataset = tt_train.models.quality.rows_of(rows_file, tokenizer, longest=128)
    losses = []
    for row in dataset:
        with torch.no_grad():
            found = model(torch.tensor([row["input_ids"]]))[0, :-1].float()
        targets = torch.tensor(row["labels"][1:])
        losses.append(F.cross_entropy(found[targets != -100], targets[targets != -100], reduction="none"))
    assert kept["after"]["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=2e-2)
    assert kept["measured_on"] == str(rows_file)


def test_agreement_counts_tokens_before_the_first_difference():
    found = agreement([[1, 2, 3, 4], [1, 2], [5], []], [[1, 2, 9, 4], [1, 2], [5, 6], []])
    assert found == {"answers": 4, "identical": 2, "same_tokens": (0.5 + 1 + 0.5 + 1) / 4}


def test_settings_of_torch_are_left_alone(tmp_path, wide_dir):
    """torchao's configs set the precision of fp32 products for the whole process, unless they are told not to."""
    before = torch.get_float32_matmul_precision()
    quantize_run(wide_dir, tmp_path / "out", to="int8")
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_a_directory_that_does_not_compute_the_same_when_read_back_is_an_error(tmp_path, wide_dir, monkeypatch):
    def changed(folder, **options):
        model = tt_train.models.load.load_quantized(folder, **options)
        model.model.norm.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(quantize, "load_quantized", changed)
    with pytest.raises(TrainingError, match="what was read back gives other values"):
        quantize_run(wide_dir, tmp_path / "out", to="int8")


@pytest.mark.parametrize("name", ["int8-dynamic", "int4"])
def test_a_quantized_directory_gets_a_certificate(written, name, monkeypatch):
    pytest.importorskip("transformers")
    folder, _ = written(name)
    found = verify.verify(folder)
    assert found["passed"]
    assert bool(found["not_reached"]) == (name == "int4")  # whose kernels in transformers need CUDA
    monkeypatch.setattr(stored, "runnable", lambda weight: stored.dense(weight).mul(1.2).to(weight.dtype))
    assert not verify.verify(folder)["passed"]


# ---- what runs -------------------------------------------------------------------------------------------------------


def test_what_runs_here_is_found_by_trying_it(monkeypatch):
    found = {row["format"]: row["problem"] for row in trial.trials(torch.device("cpu"))}
    assert {name for name, problem in found.items() if problem is None} == set(HERE)
    assert "CUDA" in found["fp8-dynamic"]
    monkeypatch.setattr(trial, "runnable", lambda weight: torch.zeros(64, 64, dtype=torch.bfloat16))
    assert trial.format_problem("int8", torch.device("cpu")) == "its kernel gives wrong results"


def test_a_format_that_does_not_run_here_is_refused_before_weights_load(tmp_path, wide_dir):
    with pytest.raises(ConfigError, match="--to fp8-dynamic: does not run on this machine"):
        quantize_run(wide_dir, tmp_path / "out", to="fp8-dynamic")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("itn8", "did you mean 'int8'"),
        ("4w-gptq", "the nearest is int4"),
        ("nf4", "quantize_base"),
        ("w4a61", "did you mean"),
    ],
)
def test_an_unknown_format_is_answered_with_the_nearest(word, answer):
    with pytest.raises(ConfigError, match=answer):
        find_format(word)


def test_names_of_torchtune_and_others_are_formats_here():
    assert {find_format(name.upper()).name for name in ALIASES} <= FORMATS.keys()
    assert [find_format(name).name for name in ("8w", "4w", "8da4w", "int4_unpacked")] == [
        "int8", "int4", "int8-dynamic-int4", "int4-unpacked",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({}, "which format"),
        ({"to": "int8", "group_size": 32}, "int8 has a scale for each row"),
        ({"to": "int4", "group_size": 48}, "kernels for 32, 64, 128 and 256"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(tmp_path, wide_dir, options, answer):
    with pytest.raises(ConfigError, match=answer):
        quantize_run(wide_dir, tmp_path / "out", **options)


def test_what_needs_plain_weights_says_so_of_quantized_ones(tmp_path, written, words):
    folder, _ = written("int8")
    for refused in (
        lambda: tt_train.merge_run(folder, tmp_path / "out"),
        lambda: tt_ckpt.convert(folder, tmp_path / "out", to="meta"),
        lambda: sft.main(compose("sft", overrides=[*words, f"model.path={folder}"])),
        lambda: quantize_run(folder, tmp_path / "out", to="int4"),
        lambda: tt_ckpt.load_weights(meta_model(folder.parent / "int8"), folder),
    ):
        with pytest.raises(ValueError, match="quantiz"):
            refused()
    with pytest.raises(ConfigError, match="compute in bfloat16, not in float32"):
        tt_train.load(folder, dtype=torch.float32)


# ---- files that anybody wrote ----------------------------------------------------------------------------------------

NAME = "model.layers.0.mlp.up_proj.weight"


def change(entry, **data):
    return entry | {"_data": entry["_data"] | data}


def nested(depth):
    return {"_type": "PerRow", "_data": {"dim": nested(depth - 1)} if depth else {}}


HOSTILE = {
    "an unknown tensor": lambda e: e | {"_type": "NF4Tensor"},
    "a class of python": lambda e: e | {"_type": "os.system"},
    "a list for a type": lambda e: e | {"_type": ["Int8Tensor"]},
    "a dtype that is a function": lambda e: change(e, dtype={"_type": "torch.dtype", "_data": "load"}),
    "a dtype that is a text": lambda e: change(e, dtype="int8_asym_per_token"),
    "an attribute that nobody has": lambda e: change(e, __class__=1),
    "a class for an attribute": lambda e: change(e, act_quant_kwargs={"_type": "Path", "_data": {"a": "/"}}),
    "deep nesting": lambda e: change(e, act_quant_kwargs=nested(9)),
    "an enum without this member": lambda e: change(e, act_quant_kwargs={"_type": "MappingType", "_data": "mro"}),
    "blocks of nothing": lambda e: change(e, block_size=[0, 0]),
    "blocks that do not divide": lambda e: change(e, block_size=[1, 63]),
    "blocks of another size": lambda e: change(e, block_size=[1, 32]),
    "three dimensions": lambda e: change(e, block_size=[1, 1, 64]),
    "no attributes": lambda e: e | {"_data": {}},
    "attributes that are a list": lambda e: e | {"_data": [1]},
    "a part that nobody has": lambda e: e | {"_tensor_data_names": ["qdata", "scale", "__dict__"]},
    "a part twice": lambda e: e | {"_tensor_data_names": ["qdata", "scale", "scale"]},
    "no scale": lambda e: e | {"_tensor_data_names": ["qdata"]},
    "parts that are numbers": lambda e: e | {"_tensor_data_names": [1, 2]},
    "control characters": lambda e: e | {"_type": "\x1b[31mInt8Tensor\n"},
}  # fmt: skip


def rewritten(written, folder, edit):
    """A copy of the int8 directory; ``edit(tensors, metadata)`` changes its file."""
    source, _ = written("int8")
    shutil.copytree(source, folder)
    tensors, found = load_file(source / "model.safetensors"), metadata(source)
    edit(tensors, found)
    save_file(tensors, folder / "model.safetensors", found)
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_metadata_that_does_not_fit_is_refused_in_one_line(tmp_path, written, case):
    def edit(tensors, found):
        found[NAME] = json.dumps(HOSTILE[case](json.loads(found[NAME])))

    folder = rewritten(written, tmp_path / "model", edit)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tt_train.load(folder)
    said = str(caught.value)
    assert "model.safetensors" in said
    assert "up_proj" in said
    assert said.isprintable()
    assert len(said) < 500


def _drop(name):
    return lambda tensors, found: tensors.pop(name)


def _replace(name, make):
    return lambda tensors, found: tensors.update({name: make(tensors[name])})


QDATA, SCALE = NAME.replace("weight", "_weight_qdata"), NAME.replace("weight", "_weight_scale")
DAMAGED = {
    "a part is missing": (_drop(SCALE), "1 of its tensors are missing"),
    "codes of another shape": (_replace(QDATA, lambda t: t[:32].clone()), r"qdata is int8 \[32, 64\], expected"),
    "codes of another type": (_replace(QDATA, lambda t: t.int()), "qdata is int32"),
    "scales that are whole numbers": (_replace(SCALE, lambda t: t.int()), "scale is int32"),
    "a scale that is not finite": (_replace(SCALE, lambda t: t * float("nan")), "not finite"),
    "a tensor too many": (lambda tensors, found: tensors.update({"x._weight_qdata": torch.ones(2)}), "1 unexpected"),
    "no metadata": (
        lambda tensors, found: [found.pop(k) for k in list(found) if k.startswith("model")],
        "no file says",
    ),
    "a quantized norm": (
        lambda tensors, found: found.update({"model.norm.weight": found[NAME]}),
        "only linear layers inside of the blocks",
    ),
    "a quantized embedding": (
        lambda tensors, found: found.update({"model.embed_tokens.weight": found[NAME]}),
        "only linear layers inside of the blocks",
    ),
    "a layer that is not in the model": (
        lambda tensors, found: found.update({"model.layers.9.mlp.up_proj.weight": found[NAME]}),
        "only linear layers inside of the blocks",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path, written, case):
    edit, answer = DAMAGED[case]
    folder = rewritten(written, tmp_path / "model", edit)
    with pytest.raises(ValueError, match=answer) as caught:
        tt_train.load(folder)
    assert str(caught.value).isprintable()


def test_a_file_cut_short_is_told(tmp_path, written):
    folder = tmp_path / "model"
    shutil.copytree(written("int8")[0], folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut short"):
        tt_train.load(folder)


def test_weights_stay_quantized_in_memory(written):
    folder, report = written("int8")
    model, _ = tt_train.load(folder)
    held = 0
    for parameter in model.parameters():
        parts = [getattr(parameter, name) for name in ("qdata", "scale", "zero_point") if hasattr(parameter, name)]
        held += sum(part.nbytes for part in parts) if parts else parameter.nbytes
    assert held == report["bytes_after"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_torchao_is_imported_without_its_warnings():
    """It warns of extensions for other machines: on a CPU each answer of a quantized model began with them."""
    tree = ast.parse(Path(quantized_torchao.__file__).read_text())
    quiet = [node for node in ast.walk(tree) if isinstance(node, ast.With) and "quietly" in ast.unparse(node.items[0])]
    quiet += [node for node in tree.body if isinstance(node, ast.If)]  # TYPE_CHECKING

    def imports(nodes):
        found = {node for top in nodes for node in ast.walk(top) if isinstance(node, ast.Import | ast.ImportFrom)}
        return {node for node in found if "torchao" in ast.unparse(node)}

    assert imports([tree]) == imports(quiet) != set()
