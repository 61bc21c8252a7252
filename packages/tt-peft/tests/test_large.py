"""Tensors of real size: above 2**24 values, where float32 skips whole numbers, and above 2**31, where int32 ends.

Of memory for the larger ones there is none: they are on the meta device, or one value expanded.
"""

import torch
from torch import nn

import tt_peft
from tt_peft import LoRAConfig
from tt_peft.adapter_files.checks import base_parameters
from tt_peft.adapter_files.state import entries

ROWS = 2**22 + 3  # of 4 values: above 2**24
HUGE = 2**21 + 1  # of 1024 values: above 2**31


class Experts(nn.Module):
    def __init__(self, count, out, inside):
        super().__init__()
        self.up = nn.Parameter(torch.empty(count, out, inside))


def huge():
    with torch.device("meta"):
        layers = {"embed_tokens": nn.Embedding(HUGE, 1024), "lm_head": nn.Linear(1024, HUGE, bias=False)}
        return nn.ModuleDict({**layers, "up_proj": nn.Linear(HUGE, 1024), "experts": Experts(3, 2**15 + 1, 2**15)})


def test_everything_that_counts_or_shapes_works_on_a_model_with_tensors_above_2_31_values():
    model = huge()
    config = LoRAConfig(rank=2, target_modules=("embed_tokens", "up_proj"), target_parameters=("experts.up",))
    tt_peft.apply_lora_(model, config.with_(modules_to_save="lm_head", dtype=torch.float32))
    sizes = {name: p.numel() for name, p in base_parameters(model).items()}
    assert sizes == {
        "embed_tokens.weight": HUGE * 1024,
        "lm_head.weight": HUGE * 1024,
        "up_proj.weight": HUGE * 1024,
        "up_proj.bias": 1024,
        "experts.up": 3 * (2**15 + 1) * 2**15,
    }
    assert tt_peft.adapter_files.checks.fingerprint(model)["parameters"] == sum(sizes.values())
    trained = {name: list(p.shape) for name, p in tt_peft.adapter_parameters(model).items()}
    assert trained["embed_tokens.adapters.default.lora_A"] == [2, HUGE]
    assert trained["lm_head.adapters.default.weight"] == [HUGE, 1024]
    groups = tt_peft.lora_plus_groups(model, lr=1.0)
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in tt_peft.adapter_parameters(model).values()
    )
    for entry in entries(model, "default"):
        assert entry.to_file().numel() == entry.parameter.numel()
        assert entry.from_file(entry.to_file()).shape == entry.parameter.shape
    tt_peft.remove_adapter_(model, "default")
    assert tt_peft.quantize_nf4_(model) == ["up_proj"]
    assert type(model["up_proj"]) is tt_peft.NF4Linear


def test_a_merge_above_2_24_values_reaches_the_last_row_and_comes_back():
    torch.manual_seed(0)
    model = nn.ModuleDict({"up_proj": nn.Linear(4, ROWS, bias=False, dtype=torch.bfloat16)})
    before = model["up_proj"].weight.detach().clone()
    tt_peft.apply_lora_(model, LoRAConfig(rank=1, alpha=1, target_modules="up_proj", dtype=torch.float32))
    adapter = model["up_proj"].adapters.default
    with torch.no_grad():
        adapter.lora_B[-2:] = 1.0
    report = tt_peft.merge_lora_(model, keep_base=True)
    changed = (model["up_proj"].weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [ROWS - 2, ROWS - 1]
    assert 0 < report.layers[0].lost < 0.1
    tt_peft.unmerge_lora_(model)
    assert torch.equal(model["up_proj"].weight, before)


def test_pissa_above_2_24_values_starts_from_the_principal_part():
    torch.manual_seed(0)
    left, right = torch.randn(ROWS, 1), torch.randn(1, 4)
    model = nn.ModuleDict({"up_proj": nn.Linear(4, ROWS, bias=False)})
    with torch.no_grad():
        model["up_proj"].weight.copy_(left @ right)
    tt_peft.apply_lora_(model, LoRAConfig(rank=1, target_modules="up_proj", init="pissa"))
    adapter = model["up_proj"].adapters.default
    part = adapter.spec.scaling * adapter.start_B[-1] @ adapter.start_A
    torch.testing.assert_close(part, (left @ right)[-1], rtol=1e-3, atol=1e-5)
    x = torch.randn(1, 4)
    torch.testing.assert_close(model["up_proj"](x)[0, -1], (x @ right.T * left[-1])[0, 0], rtol=1e-3, atol=1e-5)


def test_experts_above_2_24_values_are_computed_to_the_last():
    model = nn.ModuleDict({"experts": Experts(2, 2**12 + 1, 2**11)})
    nn.init.zeros_(model["experts"].up)
    config = LoRAConfig(rank=1, alpha=1, target_modules=(), target_parameters=("experts.up",))
    tt_peft.apply_lora_(model, config)
    with torch.no_grad():
        for parameter in tt_peft.adapter_parameters(model).values():
            parameter.fill_(1.0)
    effective = model["experts"].effective()["up"]
    assert (effective.numel(), effective[-1, -1, -1].item()) == (2 * (2**12 + 1) * 2**11, 1.0)
    tt_peft.merge_lora_(model)
    assert model["experts"].up.unique().tolist() == [1.0]
