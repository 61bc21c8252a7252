"""Whole models in NF4: which layers, training, loading while quantizing."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, NF4Linear, QLoRALinear, apply_lora_
from tt_peft.nf4 import dequantize, frozen_linear, is_nf4, to_nf4

INNER = ("quantized_data", "scaler_mean", "quantization_factor", "quantized_scalers", "nf4")


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
    config = LoRAConfig(
        rank=2,
        quantize_base=True,
        quantize_skip=("mlp.up_proj", "mlp.down_proj"),
        modules_to_save=("o_proj", "lm_head"),
    )
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


def test_a_dense_weight_is_let_go_as_soon_as_it_is_quantized(make_lm):
    model = make_lm(device="meta")
    apply_lora_(model, LoRAConfig(rank=2, quantize_base=True))
    module = model.model.layers[0].self_attn.q_proj
    weight = torch.randn(32, 32)
    gone = weakref.ref(weight)
    module.load_base_("weight", weight)
    del weight
    assert gone() is None
    assert sum(getattr(module.weight, name).numel() * getattr(module.weight, name).itemsize for name in INNER) < 700


def test_threads_do_not_share_the_buffer_of_dense_weights():
    weights = [to_nf4(torch.randn(256, 256, dtype=torch.bfloat16)) for _ in range(4)]
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    expected = [F.linear(x, dequantize(w)) for w in weights]

    def work(i):
        return all(torch.equal(frozen_linear(x, weights[i]), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_wrong_shape_is_refused_while_loading(make_lm):
    model = make_lm(device="meta")
    apply_lora_(model, LoRAConfig(rank=2, quantize_base=True))
    with pytest.raises(ValueError, match=r"self_attn.q_proj.weight has shape \[3, 3\], expected \[32, 32\]"):
        model.model.layers[0].self_attn.q_proj.load_base_("weight", torch.zeros(3, 3))
