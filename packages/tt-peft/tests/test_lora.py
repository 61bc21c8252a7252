import copy

import pytest
import torch
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, LoRAEmbedding, LoRALinear, apply_lora_


def adapted(layer, **changes):
    """A single layer with an adapter that changes what it computes."""
    model = nn.ModuleDict({"layer": layer})
    apply_lora_(model, LoRAConfig(**{"rank": 3, "alpha": 6, "target_modules": "layer", **changes}))
    with torch.no_grad():
        for parameter in tt_peft.adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model["layer"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_a_linear_layer_computes_the_formula(bias, rslora):
    torch.manual_seed(0)
    layer = adapted(nn.Linear(5, 7, bias=bias), use_rslora=rslora)
    low, x = layer.adapters.default, torch.randn(2, 4, 5)
    scaling = 6 / 3**0.5 if rslora else 2.0
    expected = x @ (layer.weight + scaling * low.lora_B @ low.lora_A).T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.effective_weight(), layer.weight + scaling * low.lora_B @ low.lora_A)


def test_an_embedding_computes_the_formula():
    torch.manual_seed(0)
    layer = adapted(nn.Embedding(11, 6, padding_idx=0))
    low, ids = layer.adapters.default, torch.tensor([[1, 5, 10]])
    expected = (layer.weight + 2.0 * (low.lora_B @ low.lora_A).T)[ids]
    torch.testing.assert_close(layer(ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.effective_weight()[ids], expected, rtol=1e-5, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_only_it_trains(make_lm, ids):
    model = make_lm()
    before, state = model(ids), {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    apply_lora_(model, LoRAConfig(target_modules="all-linear", modules_to_save="norm"))
    assert torch.equal(model(ids), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(tt_peft.adapter_parameters(model))
    assert all(".adapters.default." in name for name in trainable)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_layers_are_linear_layers_and_name_their_adapter_parameters(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(target_modules=("q_proj", "embed_tokens")))
    q = model.model.layers[0].self_attn.q_proj
    assert isinstance(q, nn.Linear)
    assert isinstance(model.model.embed_tokens, LoRAEmbedding)
    assert q.adapter_params() == ["adapters.default.lora_A", "adapters.default.lora_B"]


def test_dropout_is_applied_in_training_and_only_there():
    torch.manual_seed(0)
    layer = adapted(nn.Linear(64, 8), dropout=0.5)
    plain = copy.deepcopy(layer).eval()
    x = torch.randn(5, 64)
    layer.train()
    outputs = torch.stack([layer(x) for _ in range(400)])
    assert outputs.std(dim=0).mean() > 0.1
    spread = outputs.std(dim=0).max() / 20  # of the mean of 400
    torch.testing.assert_close(outputs.mean(dim=0), plain(x), rtol=0, atol=5 * spread.item())
    layer.eval()
    assert torch.equal(layer(x), plain(x))


def test_dropout_reaches_every_layer_of_a_model(make_lm, ids, randomise):
    """torchtune 0.1.0 built every layer with p=0 whatever was asked for."""
    model = make_lm()
    apply_lora_(model, LoRAConfig(dropout=0.3, target_modules="all-linear"))
    randomise(model)
    drops = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    inputs = {}
    for name, module in drops.items():
        module.register_forward_hook(lambda m, args, out, name=name: inputs.__setitem__(name, (args[0], out)))
    model.train()
    model(ids)
    for name, (x, y) in inputs.items():
        assert not torch.equal(drops[name](x), y), name


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_draws_what_peft_draws(dora, make_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_dropout=0.4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_dora=dora
    )
    theirs = peft.get_peft_model(make_llama(), config).train()
    theirs.save_pretrained(str(tmp_path))
    ours = make_llama().train()
    assert tt_peft.load_adapter(ours, tmp_path).dropout == 0.4
    torch.manual_seed(3)
    expected = theirs(ids).logits
    torch.manual_seed(3)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_an_adapter_in_fp32_works_on_a_bf16_base(drop):
    layer = adapted(nn.Linear(16, 8).bfloat16(), dtype=torch.float32, dropout=drop).train()
    assert layer.adapters.default.lora_A.dtype == torch.float32
    y = layer(torch.randn(3, 16, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.adapters.default.lora_B.grad.dtype == torch.float32


def test_autocast_computes_in_its_dtype():
    torch.manual_seed(0)
    layer, x = adapted(nn.Linear(16, 8)), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [LoRALinear, tt_peft.DoRALinear, tt_peft.QLoRALinear, tt_peft.QDoRALinear])
def test_a_layer_can_be_built_by_hand(kind):
    torch.manual_seed(0)
    layer = kind(64, 32, rank=4, alpha=2.0, dropout=0.25)
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 32), torch.randn(3, 64)
    tolerance = 0.2 if "Q" in kind.__name__ else 1e-6
    torch.testing.assert_close(layer.eval()(x), plain(x), rtol=tolerance, atol=tolerance)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(layer.adapter_params())
    assert layer.adapters.default.spec.scaling == 0.5
    layer.train()(x).sum().backward()
    assert layer.adapters.default.lora_B.grad.abs().sum() > 0
    assert kind(64, 32, False, device="meta", dtype=torch.bfloat16).bias is None


def test_a_layer_shared_by_two_parents_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    assert apply_lora_(model, LoRAConfig(rank=2, target_modules="all-linear")) == ["a.0"]
    assert model["b"][0] is model["a"][0]
    assert len(tt_peft.adapter_parameters(model)) == 2


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"quantize_base": True}])
def test_a_copy_of_an_adapted_model_computes_the_same(kind, make_lm, randomise, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(target_modules="all-linear", **kind))
    randomise(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(ids), model(ids))
    assert {p.data_ptr() for p in other.parameters()}.isdisjoint(
        p.data_ptr() for p in model.parameters() if not hasattr(p, "quantized_data")
    )


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"quantize_base": True}])
def test_an_adapted_layer_compiles_in_one_graph(kind, make_lm, randomise):
    mlp = make_lm(layers=1).model.layers[0].mlp
    apply_lora_(mlp, LoRAConfig(target_modules="up_proj", **kind))
    randomise(mlp)
    x = torch.randn(4, 32)
    expected = mlp(x)
    expected.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in tt_peft.adapter_parameters(mlp).items()}
    mlp.zero_grad()
    y = torch.compile(mlp, backend="aot_eager", fullgraph=True)(x)
    y.square().mean().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in tt_peft.adapter_parameters(mlp).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
