"""A plan counts what a step allocates, without weights."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tt_train import ConfigError, compose
from tt_train.build import build_optimizer, load_model, make_objective
from tt_train.job import assemble
from tt_train.models.plan import kind_of, largest_micro_batch, measure, plan, switches, with_config
from tt_train.step import train_step


def job_of(words, *more, recipe="sft"):
    config = compose(recipe, overrides=[*words, "max_steps=3", *more])
    return assemble(config, rows=kind_of(config))


def allocated_peak(job):
    """The most bytes of a second step that torch's CPU allocator has in use, on top of what it had before."""
    model = load_model(job)
    optimizer, objective = build_optimizer(job, model), make_objective(job.config)
    from tt_train.models.plan import _steps

    batches = next(_steps(job, job.config.micro_batch_size))
    train_step(model, batches, objective, optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        train_step(model, batches, objective, optimizer)
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("more", [[], ["adapter.rank=4"], ["activation_checkpointing=true"], ["model.dtype=bf16"]])
def test_what_a_step_is_said_to_allocate_is_what_torch_allocates(words, more):
    job = job_of(words, "model.dtype=fp32", "batch_size=4", "micro_batch_size=4", "data.shuffle=false", *more)
    found = plan(job)
    parts = found.peak.parts
    said = parts["activations"] + parts["logits"] + parts["gradients"]
    if job.config.model.dtype == "bf16":  # in so small a model the optimizer's step takes the most
        said += parts["optimizer"] - 10 * found.parameters
    assert said == pytest.approx(allocated_peak(job), rel=0.1)


def test_the_parts_of_a_full_run_follow_from_its_parameters(words):
    found = plan(job_of(words, "model.dtype=fp32", "batch_size=4", "micro_batch_size=2"))
    assert found.trained == found.parameters
    assert found.peak.parts["weights"] == 4 * found.parameters
    assert found.peak.parts["gradients"] == 4 * found.parameters
    assert found.peak.parts["optimizer"] == pytest.approx(8 * found.parameters, rel=0.01)


def test_bf16_weights_keep_the_bits_that_they_lack_and_gradients_in_fp32(words):
    found = plan(job_of(words, "model.dtype=bf16", "batch_size=4", "micro_batch_size=2"))
    assert found.peak.parts["weights"] == 2 * found.parameters
    assert found.peak.parts["gradients"] == 4 * found.parameters
    # 8 bytes of state, the 2 that are lacking, and all weights in fp32 while the optimizer runs, since they are few
    largest = max(p.numel() for p in load_model(job_of(words)).parameters())
    assert found.peak.parts["optimizer"] == pytest.approx(14 * found.parameters + 4 * largest, rel=0.01)


def test_a_base_of_4_bits_is_counted_as_such(words):
    whole = plan(job_of(words, "adapter.rank=4", "adapter.target_modules=all-linear"))
    four = plan(job_of(words, "adapter.rank=4", "adapter.target_modules=all-linear", "adapter.quantize_base=true"))
    linear = sum(
        p.numel()
        for name, p in load_model(job_of(words)).named_parameters()
        if "_proj" in name and name.endswith("weight")
    )
    saved = whole.peak.parts["weights"] - four.peak.parts["weights"]
    assert saved == pytest.approx(linear * (4 - 0.516), rel=0.01)


def test_each_switch_that_is_offered_can_be_set(words):
    job = job_of(words, "batch_size=4", "micro_batch_size=2")
    for word in switches(job.config):
        other = with_config(job, compose("sft", overrides=[*words, "max_steps=3", "micro_batch_size=2", word]))
        assert plan(other).peak.total > 0


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(words):
    job = job_of(words, "batch_size=4", "micro_batch_size=1")

    def peak_of(size):
        config = dataclasses.replace(job.config, micro_batch_size=size, batch_size=2 * size)
        return plan(with_config(job, config)).peak.total

    memory = peak_of(3) + 1
    most = largest_micro_batch(job, memory)
    assert most >= 3
    assert largest_micro_batch(job, 1) == 0


def test_shards_divide_what_trains(words):
    job = job_of(words, "model.dtype=fp32", "batch_size=4", "micro_batch_size=1")
    one, four = plan(job).peak.parts, plan(job, ranks=4).peak.parts
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4, abs=1)
    assert four["weights"] == one["weights"] // 4 + one["weights"]  # of two blocks and the root, all is gathered
    adapted = job_of(words, "adapter.rank=4", "batch_size=4", "micro_batch_size=1")
    assert plan(adapted, ranks=4).peak.parts["weights"] == plan(adapted).peak.parts["weights"]


def test_the_largest_micro_batch_of_sharded_ranks_is_larger_and_fits_each(words):
    job = job_of(words, "model.dtype=fp32", "batch_size=16", "micro_batch_size=1")
    other = with_config(job, dataclasses.replace(job.config, micro_batch_size=2, batch_size=32))
    memory = plan(other, ranks=8).peak.total
    assert memory < plan(job).peak.total  # one process cannot do it
    assert largest_micro_batch(job, memory) == 0
    most = largest_micro_batch(job, memory, ranks=8)

    def peak_of(size):
        config = dataclasses.replace(job.config, micro_batch_size=size, batch_size=2 * 8 * size)
        return plan(with_config(job, config), ranks=8).peak.total

    assert most >= 2
    assert peak_of(most) <= memory < peak_of(most + 1)


def test_shards_that_are_offloaded_are_not_on_the_gpu(words):
    words = [*words, "model.dtype=fp32", "batch_size=8", "micro_batch_size=1"]
    kept, away = (plan(job_of(words, f"parallel.cpu_offload={on}"), ranks=4, cpu=False) for on in ("false", "true"))
    assert away.peak.parts["optimizer"] == 0 < kept.peak.parts["optimizer"]
    assert away.peak.parts["weights"] == kept.peak.parts["weights"] - kept.parameters  # a quarter of 4 bytes each


def test_a_teacher_is_whole_on_every_rank(words):
    folder = next(word.removeprefix("model.path=") for word in words if word.startswith("model.path="))
    words = [*words, "model.dtype=fp32", "batch_size=8", "micro_batch_size=1"]
    taught = job_of(words, f"kd.teacher={folder}", "kd.teacher_dtype=fp32", recipe="kd")
    alone = plan(job_of(words), ranks=4).peak.parts["weights"]
    assert plan(taught, ranks=4).peak.parts["weights"] == alone + 4 * plan(job_of(words)).parameters


def test_a_batch_that_does_not_divide_by_the_ranks_is_named(words):
    with pytest.raises(ConfigError, match="batch_size: 4 is not a multiple of micro_batch_size .*; nearest that are: "):
        plan(job_of(words, "batch_size=4", "micro_batch_size=1"), ranks=3)


def test_operations_are_those_of_its_matrices(words):
    words = [*words, "model.dtype=fp32", "batch_size=2", "micro_batch_size=2"]
    job = job_of(words, "data.train_on=all")
    found = plan(job)
    matrices = sum(p.numel() for p in load_model(job).parameters() if p.dim() == 2)
    assert found.flops == pytest.approx(6 * matrices * found.tokens, rel=0.5)
    assert plan(job_of(words)).flops < 0.8 * found.flops  # tokens without a loss leave the last block early


def test_a_plan_changes_no_weights_and_loads_none(words, monkeypatch):
    job = job_of(words)
    monkeypatch.setattr("tt_ckpt.load_weights", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    state = torch.random.get_rng_state()
    plan(job)
    assert torch.equal(state, torch.random.get_rng_state())


def test_measured_steps_have_time_and_tokens(words):
    found = measure(job_of(words), steps=2)
    assert found.seconds > 0
    assert found.tokens > 0


def test_preference_rows_are_planned_with_their_reference(words, tmp_path):
    import json

    rows = tmp_path / "pairs.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"add {i} and 1", "chosen": "a b c d", "rejected": "d c"}) + "\n" for i in range(8)
        )
    )
    words = [word for word in words if not word.startswith("data.train")]
    pairs = [*words, f"data.train={rows}", "batch_size=4", "micro_batch_size=2"]
    full = plan(job_of(pairs, "model.dtype=fp32", recipe="dpo"))
    assert full.peak.parts["weights"] == 2 * 4 * full.parameters  # with a frozen copy as the reference
    free = plan(job_of(pairs, "model.dtype=fp32", "loss.name=simpo", recipe="dpo"))
    assert free.peak.parts["weights"] == 4 * free.parameters
