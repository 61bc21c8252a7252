import math

import pytest
import torch
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, apply_lora_
from tt_peft.nf4 import dequantize


def state(model):
    return {k: v.clone() for k, v in tt_peft.adapter_state_dict(model).items()}


def test_the_same_seed_gives_the_same_values_whatever_the_dtype(make_lm):
    states = []
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        model = make_lm().to(dtype)
        torch.manual_seed(11)
        apply_lora_(model, LoRAConfig(target_modules="all-linear"))
        states.append(state(model))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(torch.equal(states[0][k].bfloat16(), states[2][k]) for k in states[0])
    torch.manual_seed(12)
    other = make_lm()
    apply_lora_(other, LoRAConfig(target_modules="all-linear"))
    assert not torch.equal(
        state(other)["model.layers.0.self_attn.q_proj.lora_A.weight"], next(iter(states[0].values()))
    )


def test_init_adapter_draws_the_adapter_that_is_named_again(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    apply_lora_(model, LoRAConfig(rank=2), adapter="second")
    first, second = (
        {k: v.clone() for k, v in tt_peft.adapter_state_dict(model, n).items()} for n in ("default", "second")
    )
    torch.manual_seed(99)
    tt_peft.init_adapter_(model, "second")
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(tt_peft.adapter_state_dict(model)[key], first[key])
    assert not torch.equal(tt_peft.adapter_state_dict(model, "second")[key], second[key])


def test_a_is_uniform_and_b_zero_as_in_peft():
    model = nn.ModuleDict({"layer": nn.Linear(400, 10)})
    apply_lora_(model, LoRAConfig(rank=8, target_modules="layer"))
    low = model["layer"].adapters.default
    assert low.lora_B.count_nonzero() == 0
    assert low.lora_A.abs().max() <= 1 / math.sqrt(400)
    torch.testing.assert_close(low.lora_A.std().item(), 1 / math.sqrt(3 * 400), rtol=0.05, atol=0)


def test_gaussian_start_and_embeddings():
    model = nn.ModuleDict({"layer": nn.Linear(2000, 10)})
    apply_lora_(model, LoRAConfig(rank=8, target_modules="layer", init="gaussian"))
    low = model["layer"].adapters.default
    torch.testing.assert_close(low.lora_A.std().item(), 1 / 8, rtol=0.05, atol=0)
    assert low.lora_B.count_nonzero() == 0
    table = nn.ModuleDict({"table": nn.Embedding(10, 2000)})
    apply_lora_(table, LoRAConfig(rank=8, target_modules="table"))
    low = table["table"].adapters.default
    assert low.lora_A.count_nonzero() == 0
    torch.testing.assert_close(low.lora_B.std().item(), 1.0, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "change", [{}, {"use_dora": True}, {"init": "pissa"}, {"modules_to_save": ("norm", "lm_head")}]
)
def test_base_weights_may_come_after_the_adapter(change, make_lm, ids):
    config = LoRAConfig(target_modules="all-linear", **change)
    first = make_lm()
    weights = {k: v.clone() for k, v in first.state_dict().items()}
    torch.manual_seed(4)
    apply_lora_(first, config)
    second = make_lm(device="meta")
    names = apply_lora_(second, config)
    assert names[:1] == ["model.layers.0.self_attn.q_proj"]
    second.load_state_dict(weights, strict=False, assign=True)
    torch.manual_seed(4)
    tt_peft.init_adapter_(second)
    assert not any(p.is_meta for p in second.parameters())
    assert torch.equal(second(ids), first(ids))
    one, two = state(first), state(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_values_before_the_base_are_refused(make_lm, tmp_path):
    donor = make_lm()
    apply_lora_(donor, LoRAConfig())
    tt_peft.save_adapter(donor, tmp_path)
    model = make_lm(device="meta")
    with pytest.raises(ValueError, match=r"is on the meta device: load the base weights before"):
        tt_peft.load_adapter(model, tmp_path)
    apply_lora_(model, LoRAConfig())
    with pytest.raises(ValueError, match=r"q_proj is on the meta device: load the base weights before"):
        tt_peft.init_adapter_(model)


def test_an_adapter_goes_into_a_model_that_was_on_meta(make_lm, randomise, ids, tmp_path):
    donor = make_lm()
    weights = donor.state_dict()
    apply_lora_(donor, LoRAConfig())
    randomise(donor)
    tt_peft.save_adapter(donor, tmp_path)
    model = make_lm(device="meta")
    apply_lora_(model, LoRAConfig())
    model.load_state_dict(weights, strict=False, assign=True)
    tt_peft.load_adapter(model, tmp_path)
    assert torch.equal(model(ids), donor(ids))


def test_pissa_starts_at_the_principal_part_and_changes_nothing(make_lm, ids):
    model = make_lm()
    expected = model(ids)
    apply_lora_(model, LoRAConfig(rank=4, alpha=8, init="pissa"))
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    q = model.model.layers[0].self_attn.q_proj
    low = q.adapters.default
    U, S, Vh = torch.linalg.svd(q.weight.detach())
    torch.testing.assert_close(2.0 * low.lora_B @ low.lora_A, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-4, atol=1e-5)
    assert not low.start_A.requires_grad
    assert torch.equal(low.start_A, low.lora_A)


def test_dropout_leaves_what_pissa_started_from_alone(make_llama, ids):
    peft = pytest.importorskip("peft")
    config = {"lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": "pissa", "lora_dropout": 0.5}
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, **config)).train()
    ours = make_llama().train()
    apply_lora_(ours, LoRAConfig(rank=4, alpha=8, target_modules="q_proj", init="pissa", dropout=0.5))
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(2)
        outputs.append(model(ids).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_pissa_trains_as_in_peft_and_its_folder_counts_from_the_untouched_base(make_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_llama()
    theirs = peft.get_peft_model(
        make_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    )
    ours = make_llama()
    apply_lora_(ours, LoRAConfig(rank=4, alpha=8, init="pissa"))
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids).logits.square().mean().backward()
            optimizer.step()
    expected = ours(ids).logits
    torch.testing.assert_close(expected, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, base(ids).logits, atol=1e-3)
    tt_peft.save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    again = make_llama()
    assert tt_peft.load_adapter(again, tmp_path / "ours").rank == 8
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    third = make_llama()
    assert tt_peft.load_adapter(third, tmp_path / "theirs").init == "pissa"
    torch.testing.assert_close(third(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_resumed_pissa_run_has_the_same_start(make_lm, randomise, ids):
    config = LoRAConfig(rank=4, init="pissa", use_rslora=True)
    model, other = make_lm(), make_lm()
    for m in (model, other):
        apply_lora_(m, config)
    randomise(model)
    tt_peft.load_adapter_state_(other, tt_peft.adapter_state_dict(model))
    assert torch.equal(other(ids), model(ids))


def test_a_large_matrix_gets_a_randomised_decomposition(monkeypatch):
    from tt_peft import lowrank

    torch.manual_seed(0)
    matrix = torch.randn(60, 6) @ torch.randn(6, 50) + 0.01 * torch.randn(60, 50)
    exact = lowrank.principal_factors(matrix, 6, 2.0)
    monkeypatch.setattr(lowrank, "_EXACT_SVD", 10)
    quick = lowrank.principal_factors(matrix, 6, 2.0)
    torch.testing.assert_close(quick[1] @ quick[0], exact[1] @ exact[0], rtol=1e-3, atol=1e-3)


def test_loftq_starts_nearer_to_the_dense_model(make_lm, ids):
    target, errors = make_lm(), {}
    for init in ("kaiming", "loftq"):
        model = make_lm()
        config = LoRAConfig(rank=8, target_modules="all-linear", quantize_base=True, init=init)
        apply_lora_(model, config)
        errors[init] = (model(ids) - target(ids)).norm().item()
    assert errors["loftq"] < 0.8 * errors["kaiming"]
    q, weight = model.model.layers[0].self_attn.q_proj, target.model.layers[0].self_attn.q_proj.weight
    left = (weight - dequantize(q.weight) - q.adapters.default.delta()).norm()
    singular = torch.linalg.svdvals((weight - dequantize(q.weight)).detach())
    torch.testing.assert_close(left, singular[8:].norm(), rtol=1e-3, atol=1e-5)


def test_loftq_is_computed_while_a_model_on_meta_loads(make_lm, ids):
    config = LoRAConfig(rank=8, target_modules="all-linear", quantize_base=True, init="loftq")
    first = make_lm()
    weights = {k: v.clone() for k, v in first.state_dict().items()}
    apply_lora_(first, config)
    second = make_lm(device="meta")
    apply_lora_(second, config)
    second.load_state_dict(weights, strict=False, assign=True)
    tt_peft.init_adapter_(second)
    torch.testing.assert_close(second(ids), first(ids), rtol=1e-5, atol=1e-5)


def test_loftq_on_a_base_that_is_nf4_already_is_refused(make_lm):
    model = make_lm()
    tt_peft.quantize_nf4_(model)
    with pytest.raises(ValueError, match=r"q_proj was NF4 before: init='loftq' needs the dense weight"):
        apply_lora_(model, LoRAConfig(quantize_base=True, init="loftq"))
