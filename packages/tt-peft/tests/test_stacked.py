"""Adapters on stacked expert weights, against a mixture of experts of transformers under peft."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import tt_peft
from tt_peft import LoRAConfig, apply_lora_

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class Experts(nn.Module):
    """[b, d] -> [b, d]: every row through the expert that its index names."""

    def __init__(self, *, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        up, down = ((4, 8, 6), (4, 6, 8)) if transposed else ((4, 6, 8), (4, 8, 6))
        self.up = nn.Parameter(torch.randn(up))
        self.down = nn.Parameter(torch.randn(down))

    def forward(self, x, expert):
        up, down = (w[expert] if self.is_transposed else w[expert].transpose(1, 2) for w in (self.up, self.down))
        return torch.einsum("bh,bhd->bd", torch.relu(torch.einsum("bd,bdh->bh", x, up)), down)


@pytest.fixture
def make_moe():
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 32,
            "moe_intermediate_size": 8,
            "head_dim": 8,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
        config = transformers.Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=2, initializer_range=0.1)
        return transformers.Qwen3MoeForCausalLM(config).eval()

    return make


@pytest.mark.parametrize("transposed", [False, True])
def test_it_computes_the_formula_for_every_expert(transposed):
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts(transposed=transposed)})
    names = apply_lora_(model, LoRAConfig(rank=2, alpha=6, target_modules=(), target_parameters=("up", "experts.down")))
    assert names == ["experts.up", "experts.down"]
    plain = copy.deepcopy(model["experts"])
    with torch.no_grad():
        for p in tt_peft.adapter_parameters(model).values():
            p.add_(torch.randn_like(p) * 0.2)
    x, expert = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 1])
    expected = Experts(transposed=transposed)
    for name in ("up", "down"):
        low = model["experts"].adapters.default[name]
        change = torch.stack([3.0 * low.lora_B[e] @ low.lora_A[e] for e in range(4)])
        weight = model["experts"].get_parameter(name) + (change.transpose(1, 2) if transposed else change)
        setattr(expected, name, nn.Parameter(weight.detach()))
    torch.testing.assert_close(model["experts"](x, expert), expected(x, expert), rtol=1e-5, atol=1e-5)
    model["experts"](x, expert).sum().backward()
    assert all(p.grad is not None for p in tt_peft.adapter_parameters(model).values())
    with tt_peft.disable_adapter(model):
        torch.testing.assert_close(model["experts"](x, expert), plain(x, expert))
    assert isinstance(model["experts"].up, nn.Parameter)


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[::-1]])
def test_peft_and_we_exchange_adapters_of_experts(parameters, make_moe, randomise, ids, tmp_path):
    peft = pytest.importorskip("peft")
    ours = make_moe()
    apply_lora_(ours, LoRAConfig(rank=2, alpha=6, target_modules="q_proj", target_parameters=parameters))
    randomise(ours)
    tt_peft.save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(make_moe(), str(tmp_path / "ours")).eval()
    assert not torch.allclose(ours(ids).logits, make_moe()(ids).logits, atol=1e-3)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = make_moe()
    tt_peft.load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_pattern_gives_an_expert_weight_its_own_rank(make_moe, randomise, ids, tmp_path):
    peft = pytest.importorskip("peft")
    ours = make_moe()
    config = LoRAConfig(rank=2, target_modules=(), target_parameters=BOTH, rank_pattern={"down_proj": 3})
    apply_lora_(ours, config)
    randomise(ours)
    assert ours.model.layers[0].mlp.experts.adapters.default["down_proj"].lora_A.shape == (4, 3, 8)
    tt_peft.save_adapter(ours, tmp_path)
    again = make_moe()
    tt_peft.load_adapter(again, tmp_path)
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).target_parameters


def test_it_works_under_compile():
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts()})
    apply_lora_(model, LoRAConfig(rank=2, target_modules=(), target_parameters=("up", "down")))
    with torch.no_grad():
        for p in tt_peft.adapter_parameters(model).values():
            p.add_(torch.randn_like(p) * 0.2)
    x, expert = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 1])
    expected = model["experts"](x, expert)
    torch.testing.assert_close(torch.compile(model["experts"], backend="aot_eager")(x, expert), expected)
    assert not {"up", "down"} & set(vars(model["experts"]))


def test_an_exception_inside_leaves_the_parameters():
    model = nn.ModuleDict({"experts": Experts()})
    apply_lora_(model, LoRAConfig(rank=2, target_modules=(), target_parameters=("up",)))
    with pytest.raises(IndexError):
        model["experts"](torch.randn(1, 8), torch.tensor([99]))
    assert isinstance(model["experts"].up, nn.Parameter)


def test_merge_and_unmerge(make_moe, randomise, ids):
    model = make_moe()
    apply_lora_(model, LoRAConfig(rank=2, target_modules=(), target_parameters=BOTH))
    randomise(model)
    expected = model(ids).logits
    report = tt_peft.merge_lora_(model)
    assert len(report.layers) == 4
    assert type(model) is type(make_moe())
    assert model.state_dict().keys() == make_moe().state_dict().keys()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    tt_peft.unmerge_lora_(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with tt_peft.disable_adapter(model):
        torch.testing.assert_close(model(ids).logits, make_moe()(ids).logits, rtol=1e-5, atol=1e-5)


def test_only_three_dimensional_parameters_are_stacked(make_lm):
    with pytest.raises(ValueError, match=r"target_parameters: 'q_proj.weight' matches no"):
        apply_lora_(make_lm(), LoRAConfig(target_parameters=("q_proj.weight",)))


def test_routers_get_no_adapter_unasked_and_are_not_quantized():
    moe = nn.Module()
    moe.gate, moe.experts, moe.shared = nn.Linear(8, 8), Experts(), nn.Linear(8, 8)
    model = nn.ModuleDict({"mlp": moe})
    assert apply_lora_(model, LoRAConfig(rank=2, target_modules="all-linear", quantize_base=True)) == ["mlp.shared"]
    assert type(moe.gate) is nn.Linear
    assert apply_lora_(model, LoRAConfig(rank=2, target_modules="gate"), adapter="router") == ["mlp.gate"]


def test_a_model_with_stacked_adapters_can_be_pickled_and_copied(make_moe, randomise, ids):
    model = make_moe()
    apply_lora_(model, LoRAConfig(rank=2, target_modules=(), target_parameters=BOTH))
    randomise(model)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(ids).logits, model(ids).logits)
        tt_peft.merge_lora_(again)
        assert type(again.model.layers[0].mlp.experts) is type(make_moe().model.layers[0].mlp.experts)
