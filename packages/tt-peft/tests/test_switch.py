import pytest
import torch

import tt_peft
from tt_peft import LoRAConfig, apply_lora_, disable_adapter, set_adapter_


@pytest.fixture
def two(make_lm, randomise):
    """A model with adapters "default" (q, v) and "other" (all linear layers and the norm in full)."""
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    randomise(model, seed=1)
    apply_lora_(model, LoRAConfig(rank=3, target_modules="all-linear", modules_to_save="norm"), adapter="other")
    randomise(model, seed=2)
    return model


def test_adapters_are_switched_by_name(two, make_lm, ids):
    base = make_lm()(ids)
    assert tt_peft.adapter_names(two) == ["default", "other"]
    assert tt_peft.active_adapters(two) == ("other",)
    outputs = {}
    for name in ("default", "other"):
        set_adapter_(two, name)
        outputs[name] = two(ids)
        assert tt_peft.active_adapters(two) == (name,)
        assert all(f".adapters.{name}." in key for key in tt_peft.adapter_parameters(two))
        assert {key for key, p in two.named_parameters() if p.requires_grad} == set(tt_peft.adapter_parameters(two))
    assert not torch.allclose(outputs["default"], outputs["other"], atol=1e-3)
    assert not torch.allclose(outputs["default"], base, atol=1e-3)


def test_several_active_adapters_add_up(make_lm, randomise, ids):
    model = make_lm()
    for seed, name in enumerate(("one", "two")):
        apply_lora_(model, LoRAConfig(rank=2), adapter=name)
        randomise(model, seed=seed)
    set_adapter_(model, ("one", "two"))
    q = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    expected = x @ (q.weight + q.adapters.one.delta() + q.adapters.two.delta()).T + q.bias
    torch.testing.assert_close(q(x), expected)
    assert len(tt_peft.adapter_parameters(model)) == 2 * 2 * 4


def test_disable_adapter_gives_the_base_and_then_the_adapter_back(two, make_lm, ids):
    before = two(ids)
    with disable_adapter(two):
        assert torch.equal(two(ids), make_lm()(ids))
        with disable_adapter(two):
            assert torch.equal(two(ids), make_lm()(ids))
        assert torch.equal(two(ids), make_lm()(ids))
    assert torch.equal(two(ids), before)
    with pytest.raises(RuntimeError), disable_adapter(two):
        raise RuntimeError
    assert torch.equal(two(ids), before)


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"init": "pissa"}, {"modules_to_save": "norm"}])
def test_a_frozen_copy_of_an_adapter_computes_what_it_did_when_it_was_made(make_lm, randomise, ids, change):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2, **change))
    randomise(model, seed=1)
    then, trained = model(ids), set(tt_peft.adapter_parameters(model))
    tt_peft.copy_adapter_(model, "start")
    assert torch.equal(model(ids), then)
    randomise(model, seed=2)
    now = model(ids)
    with tt_peft.use_adapter(model, "start"), torch.no_grad():
        assert torch.equal(model(ids), then)
        with disable_adapter(model):
            assert torch.equal(model(ids), make_lm()(ids))
    assert torch.equal(model(ids), now)
    assert not torch.allclose(now, then, atol=1e-3)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    tt_peft.copy_adapter_(model, "start")
    with tt_peft.use_adapter(model, "start"):
        assert torch.equal(model(ids), now)
    with pytest.raises(ValueError, match="no adapter 'strat'"), tt_peft.use_adapter(model, "strat"):
        pass


def test_disable_adapter_is_the_base_with_dora_and_nf4(make_lm, randomise, ids):
    for change in ({"use_dora": True}, {"init": "pissa"}):
        model = make_lm()
        apply_lora_(model, LoRAConfig(**change))
        randomise(model)
        with disable_adapter(model):
            assert torch.equal(model(ids), make_lm()(ids))


def test_a_removed_adapter_leaves_the_others_and_in_the_end_the_plain_model(two, make_lm, ids):
    set_adapter_(two, "default")
    expected = two(ids)
    tt_peft.remove_adapter_(two, "other")
    assert tt_peft.adapter_names(two) == ["default"]
    assert torch.equal(two(ids), expected)
    tt_peft.remove_adapter_(two, "default")
    plain = make_lm()
    assert [type(m) for m in two.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(two(ids), plain(ids))
    with pytest.raises(ValueError, match="the model has no adapter 'default'; it has: none"):
        tt_peft.remove_adapter_(two, "default")
    apply_lora_(two, LoRAConfig(rank=2, quantize_base=True))
    tt_peft.remove_adapter_(two, "default")
    assert type(two.model.layers[0].self_attn.q_proj) is tt_peft.NF4Linear


def test_unknown_and_repeated_names_are_refused(two, make_lm):
    with pytest.raises(ValueError, match="the model has no adapter 'nope'; it has: default, other"):
        set_adapter_(two, "nope")
    with pytest.raises(ValueError, match="the model already has an adapter 'other'"):
        apply_lora_(two, LoRAConfig(), adapter="other")
    with pytest.raises(ValueError, match="adapter name 'a.b' is not valid"):
        apply_lora_(two, LoRAConfig(), adapter="a.b")
    with pytest.raises(ValueError, match="the model has no adapter to disable"), disable_adapter(make_lm()):
        pass


def test_a_second_adapter_that_is_dora_leaves_the_first_as_it_was(make_lm, randomise, ids):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    randomise(model)
    before = model(ids)
    apply_lora_(model, LoRAConfig(rank=2, use_dora=True), adapter="dora")
    torch.testing.assert_close(model(ids), make_lm()(ids), rtol=1e-5, atol=1e-5)
    set_adapter_(model, "default")
    torch.testing.assert_close(model(ids), before, rtol=1e-6, atol=1e-6)
    set_adapter_(model, ("default", "dora"))
    torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-5)


def test_names_do_not_depend_on_wrappers(make_lm, randomise, tmp_path):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    randomise(model)
    keys = list(tt_peft.adapter_state_dict(model))
    compiled = torch.compile(model, backend="eager")
    assert list(tt_peft.adapter_state_dict(compiled)) == keys
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert sorted(tt_peft.adapter_state_dict(model)) == sorted(keys)
    tt_peft.save_adapter(model, tmp_path)
    tt_peft.load_adapter(make_lm(), tmp_path)


@pytest.mark.parametrize("how", ["compile", "checkpointing", "data parallel"])
def test_a_wrapped_model_is_adapted_saved_and_loaded_as_the_model_inside(how, make_lm, randomise, ids, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped():
        model = make_lm()
        if how == "checkpointing":
            model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
            return model
        return torch.compile(model, backend="eager") if how == "compile" else torch.nn.DataParallel(model)

    model, config = wrapped(), LoRAConfig(rank=2, target_modules="all-linear", modules_to_save="norm")
    assert sorted(apply_lora_(model, config)) == sorted(apply_lora_(make_lm(), config))
    randomise(model)
    tt_peft.save_adapter(model, tmp_path)
    plain, again = make_lm(), wrapped()
    for other in (plain, again):
        tt_peft.load_adapter(other, tmp_path)
        torch.testing.assert_close(other(ids), model(ids))


def test_a_part_of_the_model_called_module_keeps_its_name(make_lm, randomise, ids, tmp_path):
    def build():
        model = torch.nn.Module()
        model.module = make_lm()
        return model

    model, again = build(), build()
    apply_lora_(model, LoRAConfig(rank=2))
    assert next(iter(tt_peft.adapter_state_dict(model))).startswith("module.model.layers.0")
    randomise(model)
    tt_peft.save_adapter(model, tmp_path)
    tt_peft.load_adapter(again, tmp_path)
    assert torch.equal(again.module(ids), model.module(ids))


def test_a_name_given_twice_counts_once(two, ids):
    set_adapter_(two, "default")
    expected = two(ids)
    set_adapter_(two, ("default", "default"))
    assert torch.equal(two(ids), expected)
    assert tt_peft.active_adapters(two) == ("default",)


def test_adapters_may_save_different_modules(make_lm, randomise, ids):
    models = {}
    both = make_lm()
    for name, saved in (("one", ("lm_head",)), ("two", ("norm",)), ("three", ())):
        config = LoRAConfig(rank=2, modules_to_save=saved)
        apply_lora_(both, config, adapter=name)
        randomise(both, seed=len(name))
        models[name] = make_lm()
        apply_lora_(models[name], config, adapter=name)
        tt_peft.load_adapter_state_(models[name], tt_peft.adapter_state_dict(both, name), adapter=name)
    for name, alone in models.items():
        tt_peft.set_adapter_(both, name)
        assert torch.equal(both(ids), alone(ids))
    with tt_peft.disable_adapter(both):
        assert torch.equal(both(ids), make_lm()(ids))
    tt_peft.set_adapter_(both, "one")
    tt_peft.merge_lora_(both)
    torch.testing.assert_close(both(ids), models["one"](ids))
