"""Experts against a loop over tokens, their files against transformers', and the load-balancing loss."""

import copy
import json

import pytest
import torch

import tt_models
from tt_models.moe import Experts, MoE, grouped_linear, softmax_then_top_k

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize(("hidden", "inner"), [(16, 24), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_a_loop_over_tokens(dtype, hidden, inner, close):
    experts = Experts(4, hidden, inner).to(dtype)
    experts.reset_parameters(0.5)
    x = torch.randn(10, hidden, dtype=dtype)
    weights, chosen = softmax_then_top_k(torch.randn(10, 4), top_k=2, renormalize=True)
    chosen[:, 0], chosen[:, 1] = chosen[:, 0] % 3, 3  # one is everybody's, and some are nobody's
    found = experts(x, weights.to(dtype), chosen)
    for token in range(10):
        expected = 0
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, up = (experts.gate_up_proj[expert].float() @ x[token].float()).chunk(2)
            expected += weight * (experts.down_proj[expert].float() @ (torch.nn.functional.silu(gate) * up))
        close(found[token], expected.to(dtype))


def test_grouped_linear_takes_any_alignment(close):
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for size, dtype in ((size, dtype) for size in (16, 3) for dtype in dtypes):
        x, weight = torch.randn(7, size, dtype=dtype), torch.randn(3, 2 * size, size, dtype=dtype)
        counts = torch.tensor([2, 0, 5])
        expected = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
        close(grouped_linear(x, weight, counts), expected)


@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_renormalizes_on_request(renormalize):
    weights, experts = softmax_then_top_k(torch.tensor([[1.0, 3.0, 2.0]]), top_k=2, renormalize=renormalize)
    assert experts.tolist() == [[1, 2]]
    assert (weights.sum().item() == pytest.approx(1.0)) == renormalize


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_files_hold_what_transformers_writes(model_type, seed, random_hf_config, reference_of, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    config = random_hf_config(model_type, seed)
    reference = reference_of(config)
    reference.save_pretrained(tmp_path)
    files = {}
    for path in tmp_path.glob("*.safetensors"):
        files |= safetensors.load_file(path)
    model = tt_models.build(tt_models.config_from_hf(json.loads((tmp_path / "config.json").read_text())))
    sources = {name: getattr(model, "hf_sources", lambda name: [name])(name) for name, _ in model.named_parameters()}
    assert sorted(key for keys in sources.values() for key in keys) == sorted(files)
    if hasattr(model, "hf_sources"):
        joined = {name: model.join_from_hf(name, [files[key] for key in keys]) for name, keys in sources.items()}
    else:
        joined = files
    model.load_state_dict(joined)
    for name, value in model.state_dict().items():
        assert reference.state_dict()[name].equal(value), name
    if hasattr(model, "split_for_hf"):
        back = {}
        for name, value in model.state_dict().items():
            back |= model.split_for_hf(name, value)
        assert back.keys() == files.keys()
        assert all(back[key].equal(files[key]) for key in files)


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("original", [True, False])
def test_load_state_dict_takes_the_files_of_a_mixture_stacked_or_not(
    model_type, original, random_hf_config, reference_of, tmp_path
):
    safetensors = pytest.importorskip("safetensors.torch")
    reference = reference_of(random_hf_config(model_type, 1))
    reference.save_pretrained(tmp_path, save_original_format=original, max_shard_size="40KB")
    files = {}
    for path in tmp_path.glob("*.safetensors"):
        files |= safetensors.load_file(path)
    names = set(files)
    for assign in (False, True):
        model = tt_models.build(tt_models.config_from_hf(json.loads((tmp_path / "config.json").read_text())))
        assert not any(model.load_state_dict(files, assign=assign))
        assert all(reference.state_dict()[name].equal(value) for name, value in model.state_dict().items())
    assert set(files) == names  # what is given stays as it was
    twin = copy.deepcopy(model)
    assert not any(twin.load_state_dict(files))
    assert not any(torch.nn.ModuleDict({"a": twin}).load_state_dict({f"a.{key}": files[key] for key in files}))


def test_a_mixture_with_a_missing_or_misshapen_expert_is_not_loaded(small):
    model = small("mixtral", 1)
    files = {}
    for name, value in model.state_dict().items():
        files |= model.split_for_hf(name, value)
    key = next(key for key in files if ".experts.1.w3" in key)
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj"):
        model.load_state_dict({name: value for name, value in files.items() if name != key})
    with pytest.raises(RuntimeError, match=r"gate_up_proj cannot be made of .*experts.0.w1.weight"):
        model.load_state_dict(files | {key: files[key][:, 1:]})


@pytest.mark.parametrize("model_type", MIXTURES)
def test_load_balancing_loss_equals_transformers(model_type, random_hf_config, reference_of, close):
    config = random_hf_config(model_type, 1)
    reference = reference_of(config)
    model = tt_models.build(tt_models.config_from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    ids, mask = torch.randint(4, 60, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    top_k = config["num_experts_per_tok"]
    for masked in (False, True):
        if masked:
            mask[1, 5:] = 0
        expected = reference(ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
        with tt_models.record_router_logits(model) as router_logits:
            model(ids)
        found = tt_models.load_balancing_loss(router_logits, top_k=top_k, mask=mask.bool() if masked else None)
        close(found, expected)
    close(tt_models.load_balancing_loss(router_logits, top_k=top_k, mask=mask), expected)
    found.backward()
    router = next(value for name, value in model.named_parameters() if name.endswith(("gate.weight", "router.weight")))
    assert router.grad.abs().sum() > 0


def test_router_logits_need_a_mixture_and_hooks_go_away(small):
    with pytest.raises(ValueError, match="no mixture"), tt_models.record_router_logits(small("llama")):
        pass
    model = small("mixtral")
    with tt_models.record_router_logits(model) as router_logits:
        model(torch.randint(0, 60, (2, 3)))
    before = {name: value.clone() for name, value in router_logits.items()}
    model(torch.randint(0, 60, (2, 3)))
    assert len(before) == len(model.model.layers)
    assert all(router_logits[name].equal(value) for name, value in before.items())


def test_even_use_costs_top_k():
    even = {"layer": torch.zeros(8, 4)}
    assert tt_models.load_balancing_loss(even, top_k=2).item() == pytest.approx(2.0)
    uneven = {"layer": torch.tensor([[9.0, 0, 0, 0]] * 8)}
    assert tt_models.load_balancing_loss(uneven, top_k=1).item() == pytest.approx(4.0, rel=1e-2)


def test_dense_layers_among_sparse_ones(small):
    model = small("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], decoder_sparse_step=1)
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [True, False, True]
    model = small("qwen3_moe", num_hidden_layers=3, decoder_sparse_step=2, mlp_only_layers=[])
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [False, True, False]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_gradients_per_sample_go_through_a_mixture(model_type, small, close):
    model, ids = small(model_type, 1), torch.randint(7, 50, (2, 9))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, ids):
        return torch.func.functional_call(model, parameters, (ids[None],)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for index in range(2):
        expected = torch.func.grad(loss)(parameters, ids[index])
        for name, gradient in expected.items():
            close(found[name][index], gradient, 1024)
