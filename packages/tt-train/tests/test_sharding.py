"""Many devices as gloo processes on the CPU: each trains what one process does."""

import json
from itertools import pairwise

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import tt_data
from tt_train import ConfigError, TrainingError, compose
from tt_train.build import build_optimizer, load_model, make_objective
from tt_train.config import AdapterSection, ParallelSection, RunConfig
from tt_train.devices.distributed import world
from tt_train.devices.sharding import copies, squared_norm, ways
from tt_train.errors import ShownElsewhere
from tt_train.evaluate import to_device
from tt_train.job import assemble
from tt_train.losses.cross_entropy import cross_entropy
from tt_train.memory import blocks
from tt_train.optim.master_weights import InBackward
from tt_train.step import train_step


def trajectory(words, steps=5):  # the last has 5 rows
    """Losses, gradient norms and the trained weights after some steps."""
    job = assemble(compose("sft", overrides=words))
    config, here = job.config, world()
    model = load_model(job)
    optimizer, objective = build_optimizer(job, model), make_objective(config)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    batches = tt_data.batches(job.train, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
                              rank=here.rank, world_size=here.size, pad_id=job.tokenizer.pad_id)  # fmt: skip
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        micro_batches = [to_device(batch, job.device) for batch in next(batches)]
        results.append(train_step(model, micro_batches, objective, optimizer, max_grad_norm=0.5))
    with optimizer.whole(names):
        weights = {name: whole(parameter.detach()) for parameter, name in names.items()}
    return results, weights


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.clone()


def save_trajectory(words, file):
    results, weights = trajectory(words)
    if world().is_main:
        torch.save({"results": [vars(result) for result in results], "weights": weights}, file)


CASES = {
    "full": [],
    "tied": ["model.path=TIED"],
    "packed": ["data.packing=true", "data.max_seq_len=64"],
    "checkpointed": ["activation_checkpointing=true"],
    "lora": ["adapter.rank=4", "adapter.target_modules=all-linear"],
    "lora on all": [
        "adapter.rank=4",
        "adapter.target_modules=[q_proj, lm_head, embed_tokens]",
        "adapter.modules_to_save=[norm]",
    ],
    "qlora": ["adapter.rank=4", "adapter.quantize_base=true"],
    "offloaded": ["parallel.cpu_offload=true"],
    "every": ["parallel.reduce_every_micro_batch=true"],
    "qdora": ["adapter.rank=4", "adapter.quantize_base=true", "adapter.use_dora=true", "activation_checkpointing=true"],
    "pissa": ["adapter.rank=4", "adapter.init=pissa", "adapter.quantize_base=true"],
    "dora": ["adapter.rank=4", "adapter.use_dora=true"],
    "loftq": ["adapter.rank=4", "adapter.init=loftq", "adapter.quantize_base=true"],
    "sgd": ["optimizer.name=sgd", "optimizer.momentum=0.5"],
    "adagrad": ["optimizer.name=adagrad"],
    "head alone": ["adapter.rank=4", "adapter.target_modules=[lm_head]"],
}
WAYS = {
    "two replicas": (2, ["parallel.replicate=2"]),
    "two shards": (2, ["parallel.shard=2"]),
    "two replicas of two shards": (4, ["parallel.shard=2"]),
}


@pytest.fixture
def tied_dir(model_dir, tmp_path):
    """The model with one matrix as embedding and output projection."""
    import tt_ckpt
    import tt_models

    config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": True}
    torch.manual_seed(5)
    tt_ckpt.save_hf(
        tt_models.build(tt_models.config_from_hf(config)), tmp_path / "tied", config=config, source=model_dir
    )
    return tmp_path / "tied"


@pytest.mark.parametrize(
    ("case", "way"),
    [(case, "two shards") for case in CASES]
    + [(case, way) for case in ("full", "lora", "qlora") for way in WAYS if way != "two shards"],
)
def test_many_ranks_train_what_one_process_does(case, way, words, tied_dir, ranks, tmp_path):
    words = [
        word.replace("TIED", str(tied_dir)) for word in (*words, *CASES[case], "batch_size=8", "micro_batch_size=2")
    ]
    results, weights = trajectory(words)
    size, more = WAYS[way]
    ranks(size, save_trajectory, [*words, *more], tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    for step, (one, many) in enumerate(zip(results, found["results"], strict=True)):
        close = {"rel": 1e-6 if step == 0 else 1e-5}
        assert many["loss"] == pytest.approx(one.loss, **close)
        assert many["grad_norm"] == pytest.approx(one.grad_norm, **close)
        assert (many["tokens"], many["outcome"]) == (one.tokens, "updated")
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_each_update_in_the_backward_pass_is_that_of_one_process(way, words, ranks, tmp_path):
    words = [*words, "optimizer_in_backward=true", "max_grad_norm_of=parameter", "activation_checkpointing=selective"]
    results, weights = trajectory([*words, "micro_batch_size=8"])
    size, more = WAYS[way]
    ranks(size, save_trajectory, [*words, *more, f"micro_batch_size={8 // size}"], tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    for ours, theirs in zip(results, found["results"], strict=True):
        assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours.grad_norm, rel=1e-5)
        assert theirs["tokens"] == ours.tokens
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-5)


def test_copies_whose_gradients_come_in_another_order_are_not_added_up(ranks):
    ranks(2, another_order)


def another_order():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = InBackward(*(torch.optim.SGD([weight], lr=0.1) for weight in weights))
    loss = weights[1 - world().rank].sum()
    with pytest.raises(TrainingError, match="in another order on another rank"), optimizer.updating(1.0, None):
        loss.backward()


def test_each_block_is_gathered_alone_in_bf16_while_the_one_before_computes(words, ranks):
    ranks(2, groups, [*words, "model.dtype=bf16"])


def groups(words):
    model = load_model(assemble(compose("sft", overrides=words)))
    every = [module._get_fsdp_state() for module in (*blocks(model), model)]
    held = [{(id(each._module_info.module), each._module_info.param_name)
             for each in state._fsdp_param_group.fsdp_params} for state in every]  # fmt: skip
    assert sum(map(len, held)) == len(set().union(*held)) == len(list(model.parameters()))
    for block, own in zip(blocks(model), held, strict=False):
        assert own == {(id(module), name) for module in block.modules() for name in module._parameters
                       if module._parameters[name] is not None}  # fmt: skip
    for state in every:
        policy = state._mp_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs  # positions and norms stay fp32 where the block computes them so
    for before, after in pairwise(every[:-1]):
        assert before._states_to_forward_prefetch == [after]


# ---- traps ----


def loaded(words):
    job = assemble(compose("sft", overrides=words))
    model = load_model(job)
    return job, model, build_optimizer(job, model)


def rank_batch(job, length):
    generator = torch.Generator().manual_seed(7 + world().rank)
    ids = torch.randint(3, 300, (2, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def weights_of(model):
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def nan_on_rank_1(model, batch):
    part = cross_entropy(model, batch)
    return part._replace(loss=part.loss * float("nan")) if world().rank == 1 else part


def refuse_nan(words):
    job, model, optimizer = loaded(words)
    before = weights_of(model)
    result = train_step(model, [rank_batch(job, 9)], nan_on_rank_1, optimizer)
    assert (result.outcome, result.ranks) == ("not_finite", (1,))
    assert result.first_nonfinite is not None
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
    assert train_step(model, [rank_batch(job, 9)], cross_entropy, optimizer).outcome == "updated"


@pytest.mark.parametrize("more", [["parallel.shard=2"], ["adapter.rank=4"]])
def test_nan_on_one_rank_updates_nobody_and_names_the_rank(more, words, ranks):
    ranks(2, refuse_nan, [*words, *more])


def pass_with_nothing(words):
    job, model, optimizer = loaded(words)
    batches = [rank_batch(job, 9), rank_batch(job, 3 + 4 * world().rank)]
    if world().rank == 1:
        for batch in batches:
            batch["labels"].fill_(-100)
    before = weights_of(model)
    result = train_step(model, batches, cross_entropy, optimizer)
    assert (result.outcome, result.tokens) == ("updated", 2 * 8 + 2 * 2)
    after = weights_of(model)
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    for batch in batches:
        batch["labels"].fill_(-100)
    assert train_step(model, batches, cross_entropy, optimizer).outcome == "empty"
    assert all(torch.equal(after[name], weight) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("more", [["parallel.shard=2"], ["adapter.rank=4"]])
def test_a_rank_with_nothing_to_train_on_takes_part_and_adds_nothing(more, words, ranks):
    ranks(2, pass_with_nothing, [*words, *more])


def count_reductions(words, each):
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    job, model, optimizer = loaded(words)
    calls, reduce = [], groups.foreach_reduce
    groups.foreach_reduce = lambda *args: calls.append(1) or reduce(*args)
    train_step(model, [rank_batch(job, 6) for _ in range(4)], cross_entropy, optimizer)
    assert len(calls) == each * (job.model_config.num_hidden_layers + 1)


@pytest.mark.parametrize(("key", "each"), [("false", 1), ("true", 4)])
def test_sharded_gradients_are_reduced_once_per_step_unless_every_micro_batch_is(key, each, words, ranks):
    ranks(2, count_reductions, [*words, f"parallel.reduce_every_micro_batch={key}"], each)


def norms():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(1)
    wholes = [torch.randn(5, 3), torch.randn(7), torch.randn(1, 4), torch.randn(3)]
    placements = [[Replicate(), Shard(0)]] * 3 + [[Replicate(), Replicate()]]
    spread = [distribute_tensor(w, mesh, p) for w, p in zip(wholes, placements, strict=True)]
    one = distribute_tensor(wholes[0], mesh["shard"], [Shard(0)])
    plain = torch.ones(6)
    own = torch.tensor(squared_norm([*spread, plain], 4), dtype=torch.float64)
    expected = torch.nn.utils.get_total_norm([*wholes, plain])
    assert float(world().sum(own)) ** 0.5 == pytest.approx(float(expected), rel=1e-6)
    assert copies(spread[0], 4) == 2
    assert copies(plain, 4) == 4
    assert copies(one, 4) == 2


def test_the_norm_over_sharded_and_replicated_gradients_is_that_of_one_process(ranks):
    ranks(4, norms)


def look_at_dtypes(words):
    job, model, optimizer = loaded([*words, "model.dtype=bf16"])
    seen = {}
    block = model.model.layers[0]
    block.mlp.register_forward_pre_hook(
        lambda *_: seen.update({name: (p.dtype, tuple(p.shape)) for name, p in block.named_parameters()})
    )
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    train_step(model, [rank_batch(job, 5)], cross_entropy, optimizer)
    for name, dtype in kept.items():
        assert dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    assert all(dtype == kept[f"model.layers.0.{name}"] for name, (dtype, _) in seen.items())
    assert seen["mlp.gate_proj.weight"][1] == (64, 32)  # gathered


def test_a_frozen_bf16_base_stays_bf16_and_an_adapter_fp32(words, ranks):
    ranks(2, look_at_dtypes, [*words, "adapter.rank=4", "parallel.shard=2"])


def compare_start(words, expected):
    _, model, _ = loaded(words)
    found = {name: weight for name, weight in weights_of(model).items() if "lora_" in name}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)


def test_lora_starts_from_the_same_numbers_in_any_world(words, ranks):
    words = [*words, "adapter.rank=3", "adapter.target_modules=all-linear"]
    expected = {name: weight for name, weight in weights_of(loaded(words)[1]).items() if "lora_" in name}
    assert all(bool(weight.any()) == ("lora_A" in name) for name, weight in expected.items())
    ranks(2, compare_start, [*words, "parallel.shard=2"], expected)
    ranks(4, compare_start, [*words, "batch_size=16", "parallel.shard=4"], expected)


def compiled(words, file):
    import torch._dynamo.utils as dynamo

    save_trajectory(words, file)
    assert dynamo.counters["stats"]["unique_graphs"] > 0


def test_compiled_blocks_under_shards_train_what_eager_ones_do(words, ranks, tmp_path, monkeypatch):
    # traced only: inductor takes minutes; a graph that skips the hooks of FSDP would compute with shards
    monkeypatch.setattr("tt_train.build.compile_", lambda m: [block.compile(backend="eager") for block in blocks(m)])
    words = [*words, "micro_batch_size=2"]
    ranks(2, compiled, [*words, "parallel.shard=2", "compile=true"], tmp_path / "found.pt")
    _, weights = trajectory(words)
    for name, weight in torch.load(tmp_path / "found.pt")["weights"].items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5)


def names_by_rank(model, batch):
    return cross_entropy(model, batch)._replace(metrics={f"of_rank_{world().rank}": torch.ones(())})


def differ(words):
    job, model, optimizer = loaded(words)
    with pytest.raises(TrainingError, match="different metrics on different ranks"):
        train_step(model, [rank_batch(job, 5)], names_by_rank, optimizer)


def test_metrics_with_different_names_are_an_error_and_no_wrong_mean(words, ranks):
    ranks(2, differ, [*words, "adapter.rank=4"])


@pytest.mark.parametrize(
    ("parallel", "adapter", "size", "expected"),
    [
        ({}, False, 4, (1, 4)), ({}, True, 4, (4, 1)), ({"shard": 2}, True, 4, (2, 2)),
        ({"replicate": 2}, False, 4, (2, 2)), ({"shard": 8}, False, 1, (1, 1)),
        ({"shard": 2, "replicate": 2}, True, 4, (2, 2)),
    ],
)  # fmt: skip
def test_a_full_run_is_sharded_and_an_adapter_replicated_unless_the_config_says_otherwise(
    parallel, adapter, size, expected
):
    config = RunConfig(parallel=ParallelSection(**parallel), adapter=AdapterSection() if adapter else None)
    assert ways(config, size) == expected


def test_what_shards_cannot_do_is_refused_before_weights_load(words, ranks):
    ranks(2, refuses, words, ["adapter.rank=4", "adapter.dtype=bf16", "parallel.shard=2"], "are not rounded to bf16")
    ranks(2, refuses, words, ["parallel.cpu_offload=true", "parallel.replicate=2"], "nothing is sharded")


class OfPlainTensors(torch.optim.SGD):
    """An optimizer that does not know DTensors, as those of bitsandbytes do not."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(torch.ones(parameter.shape))


def test_an_optimizer_of_ones_own_that_does_not_know_shards_is_refused_before_weights_load(words, ranks, monkeypatch):
    name = f"{__name__}.OfPlainTensors"
    monkeypatch.setattr("tt_train.settings.registry._ALLOWED", {name})
    ranks(2, refuses, words, [f"optimizer.name={name}", "parallel.shard=2"], "step on shards", [__name__])
    ranks(2, assembles, words, [f"optimizer.name={name}", "parallel.replicate=2"], [__name__])


def assembles(words, more, modules):
    assemble(compose("sft", overrides=[*words, *more], allow_import=modules))


def refuses(words, wrong, text, modules=()):
    error, match = (ConfigError, text) if world().is_main else (ShownElsewhere, "another rank shows why")
    with pytest.raises(error, match=match):
        assembles(words, wrong, modules)


@pytest.mark.parametrize("parallel", [{"shard": 3}, {"replicate": 3}, {"shard": 2, "replicate": 1}])
def test_numbers_that_do_not_give_the_processes_are_refused(parallel):
    with pytest.raises(ValueError, match="4 processes"):
        ways(RunConfig(parallel=ParallelSection(**parallel)), 4)
