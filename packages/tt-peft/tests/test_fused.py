import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, LoRALinear, apply_lora_, lora, product
from tt_peft.lora import fused_lora
from tt_peft.nf4 import dequantize, to_nf4


def plain(x, weight, bias, A, B, scale):
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, A), B)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (64,)])
def test_forward_and_gradients_are_as_near_to_fp64_as_those_of_the_plain_formula(bias, nf4, shape, as_near):
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    base = to_nf4(weight) if nf4 else weight
    dense = dequantize(base) if nf4 else weight
    b = torch.randn(32) if bias else None
    leaves = [torch.randn(*shape), torch.randn(4, 64), torch.randn(32, 4)]

    def results(function, dtype):
        inputs = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        y = function(*inputs)
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in inputs)]

    found = results(lambda x, A, B: fused_lora(x, base, b, A, B, scale=0.7), torch.float32)
    reference = results(lambda x, A, B: plain(x, dense, b, A, B, 0.7), torch.float32)
    truth = results(lambda x, A, B: plain(x, dense.double(), b if b is None else b.double(), A, B, 0.7), torch.float64)
    for ours, theirs, exact in zip(found, reference, truth, strict=True):
        as_near(ours, theirs, exact)


def test_gradients_pass_gradcheck():
    torch.manual_seed(0)
    shapes = (3, 4), (5, 4), (5,), (2, 4), (5, 2)
    x, weight, bias, A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    torch.autograd.gradcheck(lambda x, b, A, B: fused_lora(x, weight.detach(), b, A, B, scale=0.3), (x, bias, A, B))


def test_the_input_gets_a_gradient_only_where_it_needs_one():
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    calls = []

    class Weight(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    weight = torch.randn(5, 4).as_subclass(Weight)
    y = fused_lora(torch.randn(3, 4), weight, None, A, B, scale=1.0)
    calls.clear()
    y.sum().backward()
    assert "matmul" not in calls
    assert "__rmatmul__" not in calls
    assert A.grad is not None


def test_nothing_as_large_as_the_output_is_kept():
    """Of the tensors that the backward needs, only the input and the [tokens, rank] product depend on the tokens."""
    saved = []
    x, A, B = torch.randn(1000, 16), torch.randn(2, 16, requires_grad=True), torch.randn(64, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        fused_lora(x, torch.randn(64, 16), None, A, B, scale=1.0)
    assert sorted(s for s in saved if 1000 in s) == [(1000, 2), (1000, 16)]


def test_it_is_chosen_for_one_adapter_without_dropout_and_equals_the_plain_path(make_lm, randomise, ids, monkeypatch):
    monkeypatch.setattr(lora, "FUSE_FROM_ROWS", 1)
    results = {}
    for fused in (True, False):
        monkeypatch.setattr(LoRALinear, "fused", fused)
        model = make_lm()
        apply_lora_(model, LoRAConfig(target_modules="all-linear"))
        randomise(model)
        y = model(ids)
        found = str(y.grad_fn.next_functions) + str(model.model.layers[0].mlp(torch.randn(2, 32)).grad_fn)
        assert ("FusedLoRA" in found) == fused
        y.square().mean().backward()
        results[fused] = [y, *(p.grad for p in tt_peft.adapter_parameters(model).values())]
    for a, b in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["dropout", "two adapters", "autocast", "few rows", "trained base"])
def test_it_is_not_chosen_where_it_does_not_apply(case):
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    apply_lora_(model, LoRAConfig(rank=2, target_modules="layer", dropout=0.5 if case == "dropout" else 0.0))
    if case == "two adapters":
        apply_lora_(model, LoRAConfig(rank=2, target_modules="layer"), adapter="second")
        tt_peft.set_adapter_(model, ("default", "second"))
    model["layer"].weight.requires_grad_(case == "trained base")
    with torch.autocast("cpu", enabled=case == "autocast"):
        y = model["layer"](torch.randn(4 if case == "few rows" else 256, 4))
    assert "Fused" not in str(y.grad_fn)
    if case == "trained base":  # the fused function has no gradient for the weight
        y.sum().backward()
        assert model["layer"].weight.grad is not None
    if case == "few rows":
        assert "Fused" in str(model["layer"](torch.randn(2, 128, 4)).grad_fn)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("nf4", [True, False])
def test_a_base_in_fp32_is_multiplied_by_onednn_as_exactly_as_by_torch(nf4, monkeypatch, as_near):
    weight = torch.randn(192, 128)
    base = to_nf4(weight) if nf4 else weight
    leaves = [torch.randn(300, 128), torch.randn(4, 128), torch.randn(192, 4)]

    def results(dtype, base):
        inputs = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        y = fused_lora(inputs[0], base, None, *inputs[1:], scale=0.7)
        return [y.detach(), *torch.autograd.grad(y.square().mean(), inputs)]

    truth = results(torch.float64, dequantize(base).double() if nf4 else base.double())
    found = {}
    for chosen in (False, True):
        monkeypatch.setattr(product, "fp32_by_onednn", lambda chosen=chosen: chosen)
        found[chosen] = results(torch.float32, base)
    for ours, theirs, exact in zip(found[True], found[False], truth, strict=True):
        as_near(ours, theirs, exact)
    x = leaves[0].clone().requires_grad_()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert product.product(x, weight).requires_grad  # F.linear, which can be differentiated
