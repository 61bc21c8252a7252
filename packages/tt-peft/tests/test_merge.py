import copy
import statistics

import pytest
import torch
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, apply_lora_, merge, merge_lora_, unmerge_lora_
from tt_peft.nf4 import is_nf4

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head", "q_proj")},
    "saved": {"modules_to_save": ("lm_head", "norm")},
    "nf4": {"quantize_base": True, "target_modules": ("q_proj", "up_proj")},
    "nf4 dora": {"quantize_base": True, "use_dora": True},
}


def trained(make_lm, randomise, kind, **sizes):
    model = make_lm(**sizes)
    apply_lora_(model, LoRAConfig(**{"rank": 4, "target_modules": "all-linear", **KINDS[kind]}))
    randomise(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_the_same_and_is_the_plain_model_again(kind, make_lm, randomise, ids):
    model = trained(make_lm, randomise, kind)
    expected = model(ids)
    merge_lora_(model)
    plain = make_lm()
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(is_nf4(p) for p in model.parameters())
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids), model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_unmerge_brings_the_adapter_and_the_base_back(kind, make_lm, randomise, ids):
    model = trained(make_lm, randomise, kind)
    expected, adapter = model(ids), {k: v.clone() for k, v in tt_peft.adapter_state_dict(model).items()}
    with tt_peft.disable_adapter(model):
        base = model(ids)
    trainable = set(tt_peft.adapter_parameters(model))
    merge_lora_(model)
    names = unmerge_lora_(model)
    assert "model.layers.0.self_attn.q_proj" in names
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tt_peft.adapter_state_dict(model)[k], v) for k, v in adapter.items())
    assert set(tt_peft.adapter_parameters(model)) == trainable
    with tt_peft.disable_adapter(model):
        torch.testing.assert_close(model(ids), base, rtol=1e-5, atol=1e-5)
    if "nf4" in kind:
        assert torch.equal(model(ids), expected)
        assert is_nf4(model.model.layers[0].self_attn.o_proj.weight)


def test_keep_base_makes_unmerge_exact(make_lm, randomise):
    model = trained(make_lm, randomise, "plain").bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge_lora_(model, keep_base=True)
    unmerge_lora_(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_merging_in_bf16_rounds_once_from_fp32_and_reports_what_is_lost(make_lm, randomise):
    model = trained(make_lm, randomise, "plain").bfloat16()
    q = model.model.layers[0].self_attn.q_proj
    base, delta = q.weight.float(), q.adapters.default.delta()
    report = merge_lora_(model)
    assert torch.equal(q.weight, (base + delta).bfloat16())
    layer = next(x for x in report.layers if x.name == "model.layers.0.self_attn.q_proj.weight")
    lost = ((q.weight.float() - base - delta).norm() / delta.norm()).item()
    assert layer.lost == pytest.approx(lost, rel=1e-3)
    assert layer.dtype == torch.bfloat16
    assert 1e-4 < layer.lost < 0.5
    worst = max(report.layers, key=lambda x: x.lost)
    median = statistics.median(x.lost for x in report.layers)
    assert (report.median, report.worst) == (median, worst)
    taken = f"takes {median:.2%} of an adapter's change at the median and {worst.lost:.2%} at most ({worst.name})"
    assert f"merged 12 weights; rounding to bfloat16 {taken}" in str(report)


def test_a_merge_that_loses_nothing_says_so(make_lm, randomise):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    randomise(model)
    said = str(merge_lora_(model.float()))
    assert said == "merged 4 weights; rounding to float32 takes nothing of an adapter's change"


def test_a_change_below_the_dtype_s_resolution_is_reported_as_lost(make_lm, randomise):
    model = make_lm()
    apply_lora_(model, LoRAConfig(rank=2))
    randomise(model, std=1e-4)
    assert all(layer.lost > 0.5 for layer in merge_lora_(model.bfloat16()).layers)


def test_dtype_of_the_merged_weights(make_lm, randomise, ids):
    model = trained(make_lm, randomise, "nf4").bfloat16()
    report = merge_lora_(model, dtype=torch.float32)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert {w.dtype for w in weights} == {torch.float32}
    assert max(layer.lost for layer in report.layers) < 1e-5
    unmerge_lora_(model)
    assert is_nf4(model.model.layers[0].self_attn.q_proj.weight)


def test_the_report_of_an_nf4_base_says_so(make_lm, randomise):
    report = merge_lora_(trained(make_lm, randomise, "nf4"))
    assert sum(layer.from_nf4 for layer in report.layers) == 4
    assert len(report.dequantized) == 8
    assert "12 weights were NF4 and are now the values that NF4 stores, not the original ones" in str(report)


def test_several_active_adapters_are_merged_together(make_lm, randomise, ids):
    model = make_lm()
    for seed, (name, dora) in enumerate((("one", False), ("two", True))):
        apply_lora_(model, LoRAConfig(rank=2, use_dora=dora), adapter=name)
        randomise(model, seed=seed)
    tt_peft.set_adapter_(model, ("one", "two"))
    expected = model(ids)
    merge_lora_(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    unmerge_lora_(model)
    assert tt_peft.active_adapters(model) == ("one", "two")


def test_the_merged_model_equals_peft_s(make_llama, randomise, ids, tmp_path):
    peft = pytest.importorskip("peft")
    ours = make_llama()
    apply_lora_(ours, LoRAConfig(rank=4, target_modules="all-linear", use_dora=True))
    randomise(ours)
    tt_peft.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path)).merge_and_unload()
    merge_lora_(ours)
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_merged_model_can_be_saved_by_transformers(make_llama, randomise, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make_llama()
    apply_lora_(model, LoRAConfig(rank=4, quantize_base=True))
    randomise(model)
    expected = model(ids).logits
    merge_lora_(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_not_merged_into(make_llama, make_lm, randomise):
    for target in ("embed_tokens", "lm_head"):
        model = make_llama(tie_word_embeddings=True)
        apply_lora_(model, LoRAConfig(rank=2, target_modules=target))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"shares its weight with .*: merging would change both"):
            merge_lora_(model)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    ours = make_lm()
    ours.config = type("Config", (), {"tie_word_embeddings": True})()
    apply_lora_(ours, LoRAConfig(rank=2, target_modules="embed_tokens"))
    with pytest.raises(ValueError, match="embed_tokens shares its weight with the output projection"):
        merge_lora_(ours)


def test_merging_nothing_twice_or_what_is_broken_is_refused(make_lm, randomise):
    with pytest.raises(ValueError, match="the model has no adapter to merge"):
        merge_lora_(make_lm())
    with pytest.raises(ValueError, match="the model is not merged"):
        unmerge_lora_(make_lm())
    model = trained(make_lm, randomise, "plain")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.adapters.default.lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: the merged weight is not finite"):
        merge_lora_(model)
    assert len(tt_peft.adapter_state_dict(model)) == 24
    model = trained(make_lm, randomise, "plain")
    merge_lora_(model)
    with pytest.raises(ValueError, match="no adapter to disable"), tt_peft.disable_adapter(model):
        pass


def test_merging_disabled_adapters_is_refused(make_lm, randomise, ids):
    """Else they would still be disabled after unmerge, for good."""
    model = trained(make_lm, randomise, "plain")
    expected = model(ids)
    with tt_peft.disable_adapter(model), pytest.raises(ValueError, match="merge outside disable_adapter"):
        merge_lora_(model)
    assert torch.equal(model(ids), expected)


def test_what_was_merged_stays_under_a_new_adapter(make_lm, randomise, ids):
    model = trained(make_lm, randomise, "plain")
    merge_lora_(model)
    merged = model(ids)
    apply_lora_(model, LoRAConfig(rank=2))
    randomise(model)
    both = model(ids)
    with pytest.raises(ValueError, match="the model is not merged"):
        unmerge_lora_(model)
    merge_lora_(model)
    unmerge_lora_(model)
    torch.testing.assert_close(model(ids), both, rtol=1e-5, atol=1e-5)
    with tt_peft.disable_adapter(model):
        torch.testing.assert_close(model(ids), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_merge_that_ends_in_the_middle_is_undone(make_lm, randomise, ids, monkeypatch, error):
    model = trained(make_lm, randomise, "plain")
    expected, calls, change = model(ids), [], merge._become

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        change(*args)

    monkeypatch.setattr(merge, "_become", failing)
    with pytest.raises(type(error)):
        merge_lora_(model)
    assert len(tt_peft.adapter_state_dict(model)) == 24
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
