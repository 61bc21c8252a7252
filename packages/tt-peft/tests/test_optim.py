import pytest
import torch

import tt_peft
from tt_peft import LoRAConfig, apply_lora_, lora_plus_groups


def test_b_learns_faster_by_the_ratio(make_lm, ids):
    model = make_lm()
    config = LoRAConfig(rank=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=("norm", "lm_head"))
    apply_lora_(model, config)
    groups = {g["name"]: g for g in lora_plus_groups(model, lr=1e-3, ratio=8, weight_decay=0.1, embedding_lr=1e-5)}
    rates = {name: (g["lr"], g["weight_decay"], len(g["params"])) for name, g in groups.items()}
    assert rates == {
        "A": (1e-3, 0.1, 2),
        "B": (8e-3, 0.1, 2),
        "embedding": (1e-5, 0.1, 2),
        "other": (1e-3, 0.1, 1),
        "vector": (1e-3, 0.0, 2),
    }
    assert {id(p) for p in groups["B"]["params"]} == {
        id(layer.self_attn.q_proj.adapters.default.lora_B) for layer in model.model.layers
    }
    held = {id(p) for g in groups.values() for p in g["params"]}
    assert held == {id(p) for p in tt_peft.adapter_parameters(model).values()}
    torch.optim.AdamW(groups.values()).step()


def test_dora_s_magnitudes_do_not_decay_and_defaults_hold(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, use_dora=True))
    groups = {g["name"]: g for g in lora_plus_groups(model, lr=1.0, weight_decay=0.1)}
    assert list(groups) == ["A", "B", "vector"]
    assert groups["B"]["lr"] == 16.0
    assert groups["vector"]["weight_decay"] == 0.0


def test_the_first_step_is_that_of_peft_s_lora_plus(make_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    ours = make_llama()
    tt_peft.load_adapter(ours, tmp_path)
    steps = {
        "ours": (ours, torch.optim.SGD(lora_plus_groups(ours, lr=0.1, ratio=4))),
        "theirs": (theirs, create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4)),
    }
    for model, optimizer in steps.values():
        model(ids).logits.square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 0.1, "ratio": -1}, {"lr": 0.1, "embedding_lr": 0.0}])
def test_rates_must_be_positive(bad, make_lm):
    with pytest.raises(ValueError, match="must be positive"):
        lora_plus_groups(make_lm(), **bad)


def test_a_model_without_an_adapter_has_no_groups(make_lm):
    model = make_lm()
    with pytest.raises(ValueError, match="the model has no adapter to train"):
        lora_plus_groups(model, lr=0.1)
