import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import tt_peft
from tt_peft import LoRAConfig, apply_lora_
from tt_peft.full_modules import SavedModule


def test_a_saved_module_trains_a_copy_and_keeps_its_own_values(make_lm, ids):
    model = make_lm().train()
    base = {n: p.clone() for n, p in model.named_parameters()}
    apply_lora_(model, LoRAConfig(rank=2, modules_to_save=("lm_head", "norm")))
    optimizer = torch.optim.SGD(tt_peft.adapter_parameters(model).values(), lr=0.5)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())
    assert not torch.equal(model.lm_head.adapters.default.weight, base["lm_head.weight"])
    assert isinstance(model.lm_head, SavedModule)
    assert torch.equal(model.lm_head.effective_weight(), model.lm_head.adapters.default.weight)
    with tt_peft.disable_adapter(model):
        assert torch.equal(model(ids), make_lm()(ids))
        assert torch.equal(model.lm_head.effective_weight(), model.lm_head.weight)


def test_each_adapter_has_a_copy_of_the_base(make_lm, randomise, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, modules_to_save="norm"))
    randomise(model)
    apply_lora_(model, LoRAConfig(rank=2, modules_to_save="norm"), adapter="second")
    assert torch.equal(model(ids), make_lm()(ids))
    norm = model.model.norm
    assert norm.adapters.second.weight.data_ptr() != norm.weight.data_ptr()
    assert norm.adapter_params() == [f"adapters.{a}.{p}" for a in ("default", "second") for p in ("weight", "bias")]


def test_a_module_cannot_have_both(make_lm):
    with pytest.raises(ValueError, match=r"lm_head is in target_modules and trained in full by modules_to_save"):
        apply_lora_(make_lm(), LoRAConfig(target_modules="lm_head", modules_to_save="lm_head"))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj is in target_modules and trained in full"):
        apply_lora_(make_lm(), LoRAConfig(target_modules="all-linear", modules_to_save="mlp"))
    model = make_lm()
    apply_lora_(model, LoRAConfig(target_modules="lm_head"))
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head has an adapter already"):
        apply_lora_(model, LoRAConfig(modules_to_save="lm_head"), adapter="second")


def test_a_copied_model_keeps_its_saved_modules(make_lm, randomise, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, modules_to_save="lm_head"))
    randomise(model)
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


def test_a_module_with_adapters_inside_cannot_be_trained_in_full(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(target_modules="up_proj"))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj has an adapter already: model.layers.0.mlp cannot be"):
        apply_lora_(model, LoRAConfig(modules_to_save="mlp"), adapter="second")


def test_another_adapter_may_lie_inside_of_a_saved_module(make_lm, randomise, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(target_modules="q_proj", modules_to_save="mlp"))
    apply_lora_(model, LoRAConfig(target_modules="up_proj"), adapter="second")
    randomise(model)
    second = model(ids)
    tt_peft.set_adapter_(model, "default")
    first = model(ids)
    tt_peft.merge_lora_(model)
    tt_peft.unmerge_lora_(model)
    torch.testing.assert_close(model(ids), first)
    tt_peft.set_adapter_(model, "second")
    torch.testing.assert_close(model(ids), second)


def test_a_model_with_saved_modules_can_be_pickled(make_lm, randomise, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, modules_to_save=("lm_head", "norm")))
    randomise(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids), model(ids))
    assert type(again.lm_head) is type(model.lm_head)
    tt_peft.merge_lora_(again)
    torch.testing.assert_close(again(ids), model(ids))


def test_a_copy_in_fp32_over_bf16_learns_small_steps_and_computes_in_bf16(make_lm, ids):
    model = make_lm().bfloat16().train()
    base = model.lm_head.weight.detach().clone()
    config = LoRAConfig(rank=2, modules_to_save=("lm_head", "norm", "mlp", "embed_tokens"), dtype=torch.float32)
    apply_lora_(model, config)
    copied = model.lm_head.adapters.default.weight
    assert {p.dtype for p in tt_peft.adapter_parameters(model).values()} == {torch.float32}
    assert model(ids).dtype == torch.bfloat16
    assert torch.equal(model(ids), make_lm().bfloat16()(ids))
    assert model.lm_head.effective_weight().dtype == torch.bfloat16
    optimizer = torch.optim.SGD(tt_peft.adapter_parameters(model).values(), lr=1e-5)
    F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tt_peft.adapter_parameters(model).values())
    optimizer.step()
    moved = copied.grad.abs() > copied.grad.abs().max() / 4
    assert (copied.detach() != base)[moved].float().mean() > 0.9
    assert (copied.detach().bfloat16() == base).float().mean() > 0.9  # in bf16 it would have been lost
    apply_lora_(model, config, adapter="second")
    assert model.lm_head.adapters.second.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_copy_in_fp32_merges_into_bf16_once_rounded_and_comes_back(make_lm, randomise, ids, dtype):
    model = make_lm().bfloat16()
    apply_lora_(model, LoRAConfig(rank=2, modules_to_save=("lm_head", "mlp"), dtype=torch.float32))
    randomise(model)
    head, before = model.lm_head.weight, model.lm_head.weight.detach().clone()
    copied, logits = model.lm_head.adapters.default.weight.detach().clone(), model(ids)
    report = tt_peft.merge_lora_(model, dtype=dtype)
    assert model.lm_head.weight is head
    assert torch.equal(head.detach(), copied.to(dtype or torch.bfloat16))
    lost = {layer.name: layer.lost for layer in report.layers}
    assert lost["lm_head.weight"] == pytest.approx(
        float((copied - head.float()).norm() / (copied - before.float()).norm()), abs=1e-6
    )
    assert "model.layers.1.mlp.down_proj.weight" in lost
    if dtype is None:
        torch.testing.assert_close(model(ids), logits, atol=0.05, rtol=0.05)
    tt_peft.unmerge_lora_(model)
    assert torch.equal(head.detach(), before)
    assert torch.equal(model.lm_head.adapters.default.weight.detach(), copied)


def test_a_module_in_nf4_cannot_be_trained_in_full(make_lm):
    model = make_lm()
    tt_peft.quantize_nf4_(model)
    with pytest.raises(ValueError, match=r"modules_to_save: model.layers.0.mlp.up_proj is NF4, .* quantize_skip"):
        apply_lora_(model, LoRAConfig(rank=2, target_modules="q_proj", modules_to_save="mlp"))
