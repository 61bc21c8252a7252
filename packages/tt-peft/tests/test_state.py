import pytest
import torch

import tt_peft
from tt_peft import LoRAConfig, apply_lora_


def test_the_state_names_are_those_of_peft_files_without_prefix(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(target_modules=("q_proj", "embed_tokens"), modules_to_save="lm_head"))
    keys = list(tt_peft.adapter_state_dict(model))
    assert keys == [
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight",
        "model.layers.1.self_attn.q_proj.lora_B.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"init": "pissa"}, {"modules_to_save": ("norm",)}])
def test_load_is_the_inverse_bit_for_bit(change, make_lm, randomise, ids):
    model, other = make_lm(), make_lm()
    for m, seed in ((model, 1), (other, 2)):
        apply_lora_(m, LoRAConfig(rank=3, **change))
        randomise(m, seed=seed)
    state = {k: v.clone() for k, v in tt_peft.adapter_state_dict(model).items()}
    tt_peft.load_adapter_state_(other, state)
    assert torch.equal(other(ids), model(ids))
    assert all(torch.equal(tt_peft.adapter_state_dict(other)[k], v) for k, v in state.items())


def test_one_of_several_adapters_is_meant(make_lm, randomise):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    apply_lora_(model, LoRAConfig(rank=3), adapter="second")
    second = tt_peft.adapter_state_dict(model, "second")
    assert {t.shape[0] for k, t in second.items() if "lora_A" in k} == {3}
    zeros = {k: torch.zeros_like(t) for k, t in second.items()}
    before = {k: t.clone() for k, t in tt_peft.adapter_state_dict(model).items()}
    tt_peft.load_adapter_state_(model, zeros, adapter="second")
    assert not any(t.any() for t in tt_peft.adapter_state_dict(model, "second").values())
    assert all(torch.equal(t, before[k]) for k, t in tt_peft.adapter_state_dict(model).items())
    assert tt_peft.adapter_config(model).rank == 2
    assert tt_peft.adapter_config(model, "second").rank == 3


def test_what_does_not_fit_is_named_and_nothing_is_changed(make_lm):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    state = {k: torch.ones_like(t) for k, t in tt_peft.adapter_state_dict(model).items()}
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for broken, message in (
        ({k: t for k, t in state.items() if k != name}, f"missing {name}"),
        ({**state, "x.lora_A.weight": torch.zeros(2, 2)}, "unexpected x.lora_A.weight"),
        ({**state, name: torch.zeros(3, 32)}, rf"{name} has shape \[3, 32\], expected \[2, 32\]"),
        ({}, "and 5 more"),
    ):
        with pytest.raises(ValueError, match=message):
            tt_peft.load_adapter_state_(model, broken)
        assert not torch.equal(tt_peft.adapter_state_dict(model)[name], state[name])
    with pytest.raises(ValueError, match="the model has no adapter 'nope'; it has: default"):
        tt_peft.adapter_state_dict(model, "nope")
    with pytest.raises(ValueError, match="the model has no adapter 'default'; it has: none"):
        tt_peft.adapter_config(make_lm())
