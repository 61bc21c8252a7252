"""The recipe qat: the model computes as torchao will store it, and a normal checkpoint is saved."""

import json

import pytest
import torch

import tt_ckpt
import tt_models
import tt_peft
import tt_train
from tt_train import compose
from tt_train.config import QuantizationSection
from tt_train.errors import ConfigError
from tt_train.inputs.fake_quantize import fake_quantize_, linear_layers
from tt_train.job import assemble
from tt_train.memory import blocks, checkpoint_activations_
from tt_train.quantized.torchao import trained_config
from tt_train.recipes import qat, sft

SECTIONS = [
    QuantizationSection(group_size=16),
    QuantizationSection(weights="int8", group_size=8),
    QuantizationSection(weights="int8", group_size=None),
    QuantizationSection(group_size=16, activations="int8"),
]
IDS = torch.arange(60).view(2, 30) * 5 % 400


def stored(model, section):
    """The same weights, quantized by torchao as it quantizes any model."""
    from torchao.quantization import quantize_

    layers = linear_layers(model)
    quantize_(model, trained_config(section), filter_fn=lambda module, name: name in layers)
    return model


def loaded(folder, dtype=torch.float32):
    model, _ = tt_train.load(folder)
    return model.to(dtype).eval()


@pytest.mark.parametrize("section", SECTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_what_torchaos_converted_model_computes(model_dir, section, dtype):
    trained, plain = loaded(model_dir, dtype), loaded(model_dir, dtype)
    names = fake_quantize_(trained, section)
    assert len(names) == 14  # seven in each of two blocks
    assert not any("lm_head" in name or "embed" in name for name in names)
    with torch.no_grad():
        rounded, exact = trained(IDS), plain(IDS)
        assert not torch.allclose(rounded, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rounded, stored(plain, section)(IDS), rtol=1e-5, atol=1e-5)
    assert trained.state_dict().keys() == loaded(model_dir).state_dict().keys()


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_of_an_adapted_layer_the_sum_is_rounded_which_is_what_a_merge_stores(model_dir, kind):
    section = SECTIONS[0]
    trained = loaded(model_dir)
    save = ["mlp.down_proj"] if kind == "modules_to_save" else []
    lora = tt_peft.LoRAConfig(
        rank=4, target_modules=["q_proj", "up_proj"], use_dora=kind == "dora", modules_to_save=save
    )
    tt_peft.apply_lora_(trained, lora)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    fake_quantize_(trained, section)
    with torch.no_grad():
        rounded = trained(IDS)
        for layer in linear_layers(trained).values():
            del layer.forward
        tt_peft.merge_lora_(trained)
        wanted = stored(trained, section)(IDS)
        torch.testing.assert_close(rounded, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rounded, stored(loaded(model_dir), section)(IDS), rtol=1e-2)


def test_the_gradient_passes_the_rounding(model_dir):
    """The gradient of a weight is that of its rounded value, as if the rounding were not there."""
    layer_name = "model.layers.0.mlp.down_proj"
    model = loaded(model_dir)
    fake_quantize_(model, SECTIONS[0])
    layer = model.get_submodule(layer_name)
    seen = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output) or output.retain_grad())
    model(IDS).logsumexp(-1).sum().backward()
    wanted = seen["y"].grad.flatten(0, 1).T @ seen["x"].flatten(0, 1)
    inside = layer.weight.grad != 0  # what is clipped at the end of its range gets none
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(layer.weight.grad[inside], wanted[inside], rtol=1e-4, atol=1e-6)


def traced_(model):
    """What ``compile_`` does, without the compiler behind the tracer, which takes a minute."""
    for block in blocks(model):
        block.compile(dynamic=True, backend="eager")


def test_checkpointing_and_compilation_change_nothing(model_dir):
    found = []
    for change in (lambda model: None, checkpoint_activations_, traced_):
        model = loaded(model_dir).train()
        change(model)
        fake_quantize_(model, SECTIONS[3])
        model(IDS).logsumexp(-1).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for other in found[1:]:
        for gradient, wanted in zip(other, found[0], strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def rows_of(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def start(model_dir, rows_file, tmp_path_factory):
    """A model that knows a part of what the rows say."""
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "device=cpu", "samples.num=0"]
    words += ["batch_size=8", "micro_batch_size=8", "max_steps=50", "optimizer.lr=1e-2"]
    run = sft.main(compose("sft", overrides=[*words, f"output_dir={tmp_path_factory.mktemp('start') / 'run'}"]))
    return run / "model"


@pytest.mark.parametrize("adapter", [[], ["adapter.rank=8", "adapter.target_modules=all-linear"]])
def test_it_learns_and_saves_a_normal_checkpoint_that_is_better_once_it_is_quantized(words, start, tmp_path, adapter):
    more = ["data.eval=0.2", "max_steps=40", "micro_batch_size=8", "optimizer.lr=5e-3", f"model.path={start}"]
    plain = sft.main(compose("sft", overrides=[*words, *more, *adapter, f"output_dir={tmp_path / 'sft'}"]))
    keys = ["quantization.group_size=16", "quantization.activations=int8"]
    run = qat.main(compose("qat", overrides=[*words, *more, *adapter, *keys, f"output_dir={tmp_path / 'qat'}"]))
    trained = [row["loss"] for row in rows_of(run) if row["loss"] is not None]
    assert trained[-1] < 0.9 * trained[0]
    losses = [row["eval_loss"] for row in rows_of(run) if row.get("eval_loss")]
    section = QuantizationSection(group_size=16, activations="int8")
    job = assemble(compose("sft", overrides=[*words, *more]))
    found = {}
    for name, folder in (("sft", plain), ("qat", run)):
        model, _ = tt_train.load(folder)
        if adapter:
            tt_peft.merge_lora_(model)
        found[name] = held_out_loss(stored(model.float().eval(), section), job)
    assert found["qat"] == pytest.approx(losses[-1], rel=1e-3)  # what training said is what is stored
    assert found["qat"] < found["sft"]
    if not adapter:
        weights = tt_ckpt.open_tensors(run / "model")
        assert set(weights.specs) == set(tt_ckpt.open_tensors(plain / "model").specs)


def held_out_loss(model, job):
    from tt_train.evaluate import held_out_figures
    from tt_train.losses.cross_entropy import cross_entropy

    figures = held_out_figures(
        model, job.held_out, cross_entropy, micro_batch_size=4, pad_id=job.tokenizer.pad_id, device=job.device
    )
    return figures["eval_loss"]


@pytest.mark.parametrize(("more", "said"), [
    (["quantization.group_size=24"], "quantization.group_size: 24 does not divide the inputs .32, 64. of 14 layers.*"
                                     "would not be rounded; take 32, 16, 8"),
    (["adapter.rank=4", "adapter.quantize_base=true"], "adapter.quantize_base: .*set it to false"),
    (["adapter.rank=4", "adapter.dropout=0.1"], "adapter.dropout: .*set it to 0"),
])  # fmt: skip
def test_layers_that_would_be_left_out_in_silence_are_refused(words, more, said):
    with pytest.raises(ConfigError, match=said):
        assemble(compose("qat", overrides=[*words, "quantization.group_size=16", *more]))


@pytest.mark.parametrize(("word", "said"), [
    ("weights=int3", "quantization.weights: expected one of int4, int8, got 'int3'"),
    ("activations=fp8", "quantization.activations: expected one of int8, got 'fp8'"),
    ("group_size=0", "quantization.group_size: must be at least 1, got 0; null: a scale for each row"),
])  # fmt: skip
def test_values_that_cannot_be_meant_are_refused_by_compose(words, word, said):
    with pytest.raises(ConfigError, match=said):
        compose("qat", overrides=[*words, f"quantization.{word}"])


def test_stacked_experts_are_refused():
    config = tt_models.config_from_hf({
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    })  # fmt: skip
    with pytest.raises(ValueError, match="is not a linear layer; qat does not support stacked experts"):
        fake_quantize_(tt_models.build(config, device="meta"), SECTIONS[0])
