"""The decoder as others use it: meta, dtypes, tied weights, hidden states, checkpointing, compile, copies."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tt_models
from tt_models.auto import FAMILIES
from tt_models.rope import Rope


@pytest.mark.parametrize("model_type", FAMILIES)
def test_built_on_meta_and_materialized_it_is_the_same_model(model_type, small):
    model = small(model_type, 1)
    twin = tt_models.build(model.config, device="meta")
    assert {value.device.type for value in twin.state_dict().values()} == {"meta"}
    assert not list(twin.buffers())
    twin.to_empty(device="cpu").load_state_dict(model.state_dict())
    assigned = tt_models.build(model.config, device="meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    ids = torch.randint(0, 60, (2, 9))
    assert twin.eval()(ids).equal(model(ids))
    assert assigned.eval()(ids).equal(model(ids))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_cast_to_bf16_keeps_its_rotation_at_position_4096(model_type, small, monkeypatch):
    """Frequencies cast with the weights would be wrong by a whole turn there."""
    model, found = small(model_type, max_position_embeddings=8192), []
    tables = Rope.tables

    def kept(*args):
        found.append(tables(*args))
        return found[-1]

    monkeypatch.setattr(Rope, "tables", kept)
    ids, far = torch.randint(0, 60, (1, 9)), torch.arange(4090, 4099)[None]
    model(ids, far)
    exact = found[:]
    found.clear()
    model.to(torch.bfloat16)(ids, far)
    assert len(found) == len(exact) >= 1
    for one, other in zip(exact, found, strict=True):
        assert all(a.bfloat16().equal(b.bfloat16()) for a, b in zip(one, other, strict=True))


def test_the_rotation_at_position_4095_is_that_of_fp64(small, monkeypatch):
    model = small(max_position_embeddings=8192, rope_theta=10000.0, rope_scaling=None).to(torch.bfloat16)
    found, tables = [], Rope.tables
    monkeypatch.setattr(Rope, "tables", lambda *args: found.append(tables(*args)) or found[-1])
    model(torch.randint(0, 60, (1, 1)), torch.tensor([[4095]]))
    half = model.config.head_dim // 2
    angles = 4095 * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    (cos, sin) = (table[0, 0, 0].double() for table in found[0])
    torch.testing.assert_close(cos, angles.cos().repeat(2), rtol=0, atol=2**-8)
    torch.testing.assert_close(sin[half:], angles.sin(), rtol=0, atol=2**-8)


def test_weights_come_from_the_global_generator_with_the_std_of_the_config(small):
    config = small().config
    torch.manual_seed(3)
    one, two = tt_models.build(config), tt_models.build(config)
    torch.manual_seed(3)
    again = tt_models.build(config)
    weight = one.model.layers[0].mlp.up_proj.weight
    assert weight.equal(again.model.layers[0].mlp.up_proj.weight)
    assert not weight.equal(two.model.layers[0].mlp.up_proj.weight)
    assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    for model_type in ("gpt_oss", "qwen3_moe"):
        parameters = dict(small(model_type, 1, initializer_range=0.07).named_parameters())
        stacked = next(value for name, value in parameters.items() if name.endswith("gate_up_proj"))
        assert stacked.std().item() == pytest.approx(0.07, rel=0.1)
        assert all(value.isfinite().all() for value in parameters.values())


def test_device_and_dtype_of_build(small):
    config = small().config
    assert next(tt_models.build(config, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    with torch.device("meta"):
        assert next(tt_models.build(config).parameters()).device.type == "meta"
    assert next(tt_models.build(config, device="cpu").parameters()).device.type == "cpu"


def test_tied_models_have_no_head_and_take_files_that_repeat_it(small):
    tied, untied = small(tie_word_embeddings=True), small(tie_word_embeddings=False)
    assert not any("lm_head" in name for name in tied.state_dict())
    assert tied.output_weight is tied.model.embed_tokens.weight
    assert untied.output_weight is untied.lm_head.weight
    state = {**tied.state_dict(), "lm_head.weight": tied.output_weight.detach()}
    assert not tied.load_state_dict(state).unexpected_keys
    other = {**state, "lm_head.weight": tied.output_weight.detach() + 1e-3}  # which transformers would use
    with pytest.raises(RuntimeError, match="but the config ties them: set tie_word_embeddings to false"):
        tied.load_state_dict(other)
    with pytest.raises(RuntimeError, match=r"lm_head.weight"):
        untied.load_state_dict({key: value for key, value in state.items() if "lm_head" not in key})


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_hidden_states_and_output_weight_make_the_logits(model_type, small, close):
    model = small(model_type)
    ids = torch.randint(0, 60, (2, 9))
    hidden = model.hidden_states(ids)
    assert hidden.shape == (2, 9, model.config.hidden_size)
    logits = hidden @ model.output_weight.T
    if model.logit_softcap is not None:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    close(logits, model(ids), 256)
    close(model.logits(hidden[:, -1]), model(ids)[:, -1], 256)


def test_logits_are_in_the_compute_dtype_unless_asked_otherwise(small):
    model = small().bfloat16()
    ids = torch.randint(0, 60, (1, 4))
    assert model(ids).dtype == torch.bfloat16
    assert model(ids, logits_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_checkpointed_blocks_have_the_same_gradients(model_type, small, monkeypatch, close):
    model = small(model_type).train()
    ids, positions = torch.randint(0, 60, (2, 12)), torch.tensor([[*range(5), *range(7)]] * 2)

    def gradients():
        model.zero_grad()
        model(ids, positions).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    for layer in model.model.layers:
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda *args, f=forward, **kwargs: checkpoint(f, *args, use_reentrant=False, **kwargs)
        )
    for one, other in zip(gradients(), expected, strict=True):
        close(one, other, 256)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_compiler_sees_one_graph(model_type, small, close):
    model = small(model_type).bfloat16()
    ids = torch.randint(0, 60, (2, 9))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(ids), model(ids), 256)
    torch.compiler.reset()


def test_one_graph_serves_all_lengths(small, close):
    model, graphs = small(), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        for length in (7, 11, 16):  # the second makes the length dynamic
            ids = torch.randint(0, 60, (2, length))
            close(compiled(ids), model(ids), 256)
    torch.compiler.reset()
    assert len(graphs) == 2


def test_a_model_is_exported_with_a_dynamic_length(small, close):
    model, length = small(), torch.export.Dim("length", min=2, max=32)
    ids = (torch.randint(0, 60, (2, 12)),)
    exported = torch.export.export(model, ids, dynamic_shapes={"input_ids": {1: length}}).module()
    longer = torch.randint(0, 60, (2, 19))
    close(exported(longer), model(longer), 256)


def test_blocks_compiled_one_by_one_are_compiled_once_for_all_packings(small, close):
    model = small("gemma3_text")
    ids = torch.randint(0, 60, (2, 40))
    packings = [torch.tensor([[*range(cut), *range(40 - cut)]] * 2) for cut in (9, 14, 20, 33)]
    expected = [model(ids, positions) for positions in packings]
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)
    for positions, logits in zip(packings, expected, strict=True):
        close(model(ids, positions), logits, 256)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(model.model.layers)
    torch.compiler.reset()


def test_models_can_be_copied_and_pickled(small):
    model = small("gemma3_text")
    ids = torch.randint(0, 60, (1, 7))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(ids).equal(model(ids))


def test_padding_embedding_gets_no_gradient_like_transformers(small):
    model = small(pad_token_id=3, tie_word_embeddings=False)
    model(torch.tensor([[3, 4, 5]])).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient[3].abs().sum() == 0
    assert gradient[4].abs().sum() > 0
    assert model.model.embed_tokens.weight[3].abs().sum() == 0


def test_layers_may_be_taken_away(small):
    model = small()
    del model.model.layers[-1]
    assert model(torch.randint(0, 60, (1, 4))).shape[:2] == (1, 4)


def test_the_compiler_sees_one_graph_of_packed_rows(small, close):
    model = small("mistral", 2)
    ids, positions = torch.randint(0, 60, (2, 12)), torch.tensor([[*range(5), *range(7)]] * 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(ids, positions), model(ids, positions), 256)
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0), (1, 2, 4)])
def test_ids_that_are_no_rows_of_tokens_are_refused(shape, small):
    with pytest.raises(ValueError, match="input_ids must be .batch, tokens. with at least one token, got"):
        small()(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4), (5, 2)])
def test_positions_of_another_shape_are_refused(shape, small):
    with pytest.raises(ValueError, match="do not fit input_ids .2, 5.: give one position per token"):
        small()(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))


def test_layers_taken_away_from_the_middle_leave_the_others_as_they_were(small):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = small("gemma3_text", num_hidden_layers=4, layer_types=kinds, sliding_window=3)
    ids = torch.randint(0, 60, (2, 12))
    rest = dataclasses.replace(model.config, num_hidden_layers=3, layer_types=tuple(kinds[1:]))
    expected = tt_models.build(rest).eval()
    del model.model.layers[0]
    expected.load_state_dict(model.state_dict())
    assert model(ids).equal(expected(ids))
    with pytest.raises(ValueError, match="made for 4 layers of several windows, the model has 3"):
        tt_models.generate(model, ids, max_new_tokens=2)
    model.config = rest
    settings = {"max_new_tokens": 8, "temperature": 0}
    assert tt_models.generate(model, ids, **settings).equal(tt_models.generate(expected, ids, **settings))
