import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, NF4Linear, QLoRALinear, apply_lora_, nf4
from tt_peft.nf4 import check_size, dequantize, frozen_linear, is_nf4, nf4_tensor_class, to_nf4

INNER = ("quantized_data", "scaler_mean", "quantization_factor", "quantized_scalers", "nf4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 256), (64, 64), (1, 64), (96, 160)])
def test_codes_scales_and_values_are_those_of_torchao(dtype, shape, monkeypatch):
    monkeypatch.setattr(nf4, "_PART", 100)
    monkeypatch.setattr(nf4, "_TILE", 256)
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    ours = to_nf4(weight)
    theirs = nf4_tensor_class().from_tensor(weight, 64, ours.scaler_block_size)
    for name in INNER:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(dequantize(ours), theirs.get_original_weight())
    assert ours.shape == weight.shape
    assert ours.dtype == dtype
    relative = (dequantize(ours).float() - weight.float()).norm() / weight.float().norm()
    assert 0.05 < relative < 0.15


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_zeros_stay_zero(dtype):
    weight = torch.randn(4, 64)
    weight[1] = 0
    assert not dequantize(to_nf4(weight.to(dtype)))[1].any()
    assert not dequantize(to_nf4(torch.zeros(2, 64, dtype=dtype))).any()
    ones = torch.ones(4, 64, dtype=dtype)
    assert torch.equal(dequantize(to_nf4(ones)), ones)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lookup_of_every_code_equals_the_arithmetic_for_the_compiler(dtype, monkeypatch):
    weight = to_nf4(torch.randn(64, 256, dtype=dtype))
    looked_up = dequantize(weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(dequantize(weight), looked_up)


def test_the_large_groups_of_torchao_are_used_where_they_fit():
    assert to_nf4(torch.randn(128, 256)).scaler_block_size == 256
    assert to_nf4(torch.randn(64, 64)).scaler_block_size == 64
    assert to_nf4(torch.randn(3, 64)).scaler_block_size == 1


def test_a_size_that_does_not_fit_and_broken_values_are_refused_by_name(make_lm):
    with pytest.raises(
        ValueError, match=r"weight \[5, 7\] cannot be NF4: its size is no multiple of 64; put it in quant"
    ):
        to_nf4(torch.randn(5, 7))
    with pytest.raises(ValueError, match="no multiple of 64"):
        check_size(torch.randn(5, 7), "x")
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "odd": nn.Linear(5, 7)})
    with pytest.raises(ValueError, match=r"odd.weight \[7, 5\] cannot be NF4"):
        apply_lora_(model, LoRAConfig(rank=2, target_modules="up", quantize_base=True))
    assert type(model["up"]) is nn.Linear
    apply_lora_(model, LoRAConfig(rank=2, target_modules="up", quantize_base=True, quantize_skip=("odd",)))
    broken = make_lm()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight has NaN or infinite values"):
        tt_peft.quantize_nf4_(broken)


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer_and_its_gradients_are_those_of_the_dequantized_weight(bias):
    torch.manual_seed(0)
    weight, b = to_nf4(torch.randn(32, 64)), torch.randn(32, requires_grad=True) if bias else None
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = frozen_linear(x, weight, b)
    y.square().sum().backward()
    found = [x.grad, b.grad if bias else None]
    x2, b2 = x.detach().requires_grad_(), b.detach().requires_grad_() if bias else None
    expected = F.linear(x2, dequantize(weight), b2)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found[0], x2.grad)
    if bias:
        torch.testing.assert_close(found[1], b2.grad)


def test_it_equals_torchao_s_linear():
    weight, x = to_nf4(torch.randn(128, 256)), torch.randn(4, 256)
    torch.testing.assert_close(frozen_linear(x, weight), F.linear(x, weight))  # torchao takes over F.linear


def test_only_codes_are_kept_for_the_backward():
    weight = to_nf4(torch.randn(64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(torch.randn(3, 64, requires_grad=True), weight)
    assert saved == []
    y.sum().backward()


def test_autocast_casts_forward_and_gradient():
    weight, x = to_nf4(torch.randn(64, 64)), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = frozen_linear(x, weight)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


def test_quantize_base_quantizes_every_linear_layer_but_the_head(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, quantize_base=True))
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["lm_head"] is nn.Linear
    assert kinds["model.layers.0.self_attn.q_proj"] is QLoRALinear
    assert kinds["model.layers.0.mlp.up_proj"] is NF4Linear
    assert all(is_nf4(model.get_submodule(n).weight) for n in kinds if n != "lm_head")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)


def test_quantize_skip_and_modules_to_save_stay_dense(make_lm):
    model = make_lm()
    config = LoRAConfig(rank=2, quantize_base=True, quantize_skip=("mlp.*",), modules_to_save=("o_proj", "lm_head"))
    apply_lora_(model, config)
    dense = {
        name for name, p in model.named_parameters() if p.dim() == 2 and not is_nf4(p) and ".adapters." not in name
    }
    layer = [
        f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert dense == {*layer, "lm_head.weight", "model.embed_tokens.weight"}


def test_a_shared_weight_is_not_quantized(make_lm):
    model = make_lm(vocab=64)
    model.lm_head.weight = model.model.embed_tokens.weight
    tt_peft.quantize_nf4_(model)
    with pytest.raises(ValueError, match=r"lm_head.weight is shared with another module: put lm_head in quantize_skip"):
        tt_peft.quantize_nf4_(model, skip=())


def test_quantize_and_dequantize_a_model(make_lm, ids):
    model = make_lm()
    names = tt_peft.quantize_nf4_(model)
    quantized = model(ids)
    assert len(names) == 12
    assert tt_peft.dequantize_(model) == names
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(ids), quantized)


def test_a_qlora_model_trains_and_its_base_stays(make_lm, ids):
    model = make_lm().train()
    apply_lora_(model, LoRAConfig(rank=4, target_modules="all-linear", quantize_base=True))
    base = {n: p.quantized_data.clone() for n, p in model.named_parameters() if is_nf4(p)}
    optimizer = torch.optim.AdamW(tt_peft.adapter_parameters(model).values(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten().roll(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.get_parameter(n).quantized_data, codes) for n, codes in base.items())


def test_gradients_are_those_of_a_dense_model_with_the_same_values(make_lm, ids, randomise):
    quantized, dense = make_lm(), make_lm()
    config = LoRAConfig(rank=4, target_modules="all-linear", quantize_base=True)
    apply_lora_(quantized, config)
    randomise(quantized)
    tt_peft.quantize_nf4_(dense)
    tt_peft.dequantize_(dense)
    apply_lora_(dense, config.with_(quantize_base=False))
    tt_peft.load_adapter_state_(dense, tt_peft.adapter_state_dict(quantized))
    for model in (quantized, dense):
        model(ids).square().mean().backward()
    torch.testing.assert_close(quantized(ids), dense(ids), rtol=1e-5, atol=1e-5)
    for a, b in zip(*(tt_peft.adapter_parameters(m).values() for m in (quantized, dense)), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_moving_an_nf4_model_keeps_its_codes(make_lm, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, quantize_base=True))
    expected = model(ids)
    assert torch.equal(model.to("cpu")(ids), expected)
    model.to(torch.bfloat16)
    assert is_nf4(model.model.layers[0].self_attn.q_proj.weight)
    torch.testing.assert_close(model(ids).float(), expected, rtol=5e-2, atol=5e-2)


def test_state_dict_goes_into_another_nf4_model_bit_for_bit(make_lm, ids):
    config = LoRAConfig(rank=2, quantize_base=True)
    model, other = make_lm(), make_lm(seed=5)
    apply_lora_(model, config)
    apply_lora_(other, config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("way", ["load_state_dict", "load_base_"])
def test_base_weights_are_quantized_while_they_load_into_a_model_on_meta(way, make_lm, ids):
    config = LoRAConfig(rank=4, target_modules="all-linear", quantize_base=True)
    before = make_lm()
    state = before.state_dict()
    torch.manual_seed(7)
    apply_lora_(before, config)
    model = make_lm(device="meta")
    apply_lora_(model, config)
    assert all(p.is_meta for p in model.parameters())
    if way == "load_state_dict":
        missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
        assert all(".adapters." in name for name in missing)
    else:
        for name, tensor in state.items():
            owner, _, local = name.rpartition(".")
            module = model.get_submodule(owner)
            if hasattr(module, "load_base_"):
                module.load_base_(local, tensor)
            else:
                setattr(module, local, nn.Parameter(tensor, requires_grad=False))
    assert is_nf4(model.model.layers[0].self_attn.q_proj.weight)
    assert not is_nf4(model.lm_head.weight)
    torch.manual_seed(7)
    tt_peft.init_adapter_(model)
    assert torch.equal(model(ids), before(ids))
    for name, tensor in tt_peft.adapter_state_dict(before).items():
        assert torch.equal(tt_peft.adapter_state_dict(model)[name], tensor)


def test_a_wrong_shape_is_refused_while_loading(make_lm):
    model = make_lm(device="meta")
    apply_lora_(model, LoRAConfig(rank=2, quantize_base=True))
    with pytest.raises(ValueError, match=r"self_attn.q_proj.weight has shape \[3, 3\], expected \[32, 32\]"):
        model.model.layers[0].self_attn.q_proj.load_base_("weight", torch.zeros(3, 3))


def test_torchao_is_imported_in_one_module_and_only_when_something_is_quantized():
    folder = Path(tt_peft.__file__).parent
    importers = [p.name for p in folder.glob("*.py") if "torchao." in p.read_text()]
    assert importers == ["nf4.py"]
    code = (
        "import sys, torch, tt_peft; from torch import nn; m = nn.Sequential(nn.Linear(8, 8));"
        "tt_peft.apply_lora_(m, tt_peft.LoRAConfig(rank=2, target_modules='all-linear')); m(torch.randn(1, 8));"
        "assert 'torchao' not in sys.modules; tt_peft.quantize_nf4_(m); assert 'torchao' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_old_and_a_new_place_of_nf4_are_found(monkeypatch):
    import importlib

    real = nf4_tensor_class()
    places = []

    def import_module(name):
        places.append(name)
        if name == "torchao.dtypes.nf4tensor":
            return type("module", (), {"NF4Tensor": real})
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    nf4_tensor_class.cache_clear()
    assert nf4_tensor_class() is real
    assert places == ["torchao.quantization", "torchao.dtypes.nf4tensor"]
    nf4_tensor_class.cache_clear()
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"this torchao has no NF4Tensor; quantize_base needs torchao >= 0.15"):
        nf4_tensor_class()
    monkeypatch.undo()
    nf4_tensor_class.cache_clear()
