"""Learning rates against transformers' schedulers; optimizers against torch's."""

import pytest
import torch

from tt_train import ConfigError, compose
from tt_train.config import OptimizerSection, ScheduleSection
from tt_train.optim import (
    decayed,
    learning_rate,
    load_optimizer_tensors_,
    make_optimizer,
    optimizer_tensors,
    rate_change,
    schedule_notes,
    set_learning_rate,
    warmup_steps,
)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_schedule_is_that_of_transformers_but_for_a_first_step_that_trains(name, warmup):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = transformers.get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=20,
    )
    section = ScheduleSection(name=name, warmup_steps=warmup)
    for step in range(20):
        ours, theirs = learning_rate(section, base=0.5, step=step, steps_total=20), reference.get_last_lr()[0]
        if step < warmup:  # theirs begins with a step at rate 0
            assert theirs == pytest.approx(0.5 * step / warmup, abs=1e-12)
            assert ours == pytest.approx(0.5 * (step + 1) / (warmup + 1), abs=1e-12)
        else:
            assert ours == pytest.approx(theirs, abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps_total", [1, 2, 3, 24, 33, 34, 1000])
def test_by_default_every_run_reaches_its_rate_and_no_step_is_lost(name, steps_total):
    section = ScheduleSection(name=name)
    rates = [learning_rate(section, base=2e-4, step=step, steps_total=steps_total) for step in range(steps_total)]
    assert max(rates) == 2e-4
    assert min(rates) > 0
    assert warmup_steps(section, steps_total) <= max(1, 0.03 * steps_total + 1)


def test_warmup_is_given_in_steps_or_as_a_share_of_the_run():
    assert warmup_steps(ScheduleSection(warmup_steps=7), 100) == 7
    assert warmup_steps(ScheduleSection(warmup_ratio=0.1), 100) == 10
    assert warmup_steps(ScheduleSection(warmup_ratio=0.1), 101) == 11  # transformers rounds up, too
    assert warmup_steps(ScheduleSection(warmup_ratio=0.0), 100) == warmup_steps(ScheduleSection(warmup_steps=0), 9) == 0
    both = ["model.path=m", "data.train=d", "schedule.warmup_steps=0", "schedule.warmup_ratio=0.1"]
    with pytest.raises(ConfigError, match=r"warmup_steps 0 and warmup_ratio 0\.1 are both given"):
        compose("sft", overrides=both)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "schedule.warmup_steps=3",
            "schedule.warmup_steps: 3 is not below the run's 3 steps, so the learning rate ends",
        ),
        ("schedule.warmup_steps=2", None),
        ("eval_every=4", "eval_every: 4 is beyond the run's 3 steps; held-out loss is measured at the end only"),
        ("eval_every=3", None),
        ("save_every=4", "save_every: 4 is beyond the run's 3 steps; no checkpoint is written before the last step"),
        ("save_every=3", None),
        ("epochs=2", "epochs: 2 has no effect, max_steps ends the run after 3 steps"),
        ("schedule.min_lr_ratio=0.1", None),
        ("schedule.min_lr_ratio=0.1 schedule.name=constant", "it has no effect on a constant schedule"),
    ],
)
def test_numbers_that_the_length_of_the_run_makes_meaningless_are_named(word, said):
    config = compose("sft", overrides=["model.path=m", "data.train=d", "max_steps=3", *word.split()])
    notes = schedule_notes(config, 3)
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_a_run_made_longer_is_told_both_rates_unless_they_are_the_same():
    config = compose("sft", overrides=["model.path=m", "data.train=d", "optimizer.lr=1e-3", "schedule.warmup_steps=0"])
    said = rate_change(config, 6, before=6, now=12)
    assert "from 6 to 12 steps: the learning rate of step 7 is 0.0005, it would have been 0;" in said
    config.schedule.name = "constant"
    assert rate_change(config, 6, before=6, now=12) is None


def test_the_floor_of_the_schedule_is_kept():
    section = ScheduleSection(name="cosine", warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(section, base=2.0, step=10, steps_total=10) == pytest.approx(0.2)
    assert learning_rate(section, base=2.0, step=0, steps_total=10) == 2.0


@pytest.mark.parametrize(
    ("section", "reference"),
    [
        (
            OptimizerSection(name="adamw", lr=0.1, weight_decay=0.3, betas=(0.5, 0.7), eps=1e-3),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, betas=(0.5, 0.7), eps=1e-3),
        ),
        (
            OptimizerSection(name="sgd", lr=0.1, weight_decay=0.3, momentum=0.5),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, momentum=0.5),
        ),
        (OptimizerSection(name="rmsprop", lr=0.1), lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.01)),
    ],
)
def test_optimizers_are_torchs_with_every_argument(section, reference):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    first, second = make_optimizer([{"params": [ours]}], section), reference([theirs])
    for step in range(5):
        for parameter in (ours, theirs):
            parameter.grad = torch.cos(parameter.detach() * (step + 1))
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_argument_that_the_optimizer_lacks_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: adamw has no momentum"):
        make_optimizer([{"params": [parameter]}], OptimizerSection(name="adamw", momentum=0.9))


def test_a_group_scales_its_rate():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 16.0}], lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0]


def test_state_goes_out_and_in_exactly():
    def trained(steps, state=None, start=None):
        parameter = torch.nn.Parameter(torch.ones(4) if start is None else start.clone())
        optimizer = make_optimizer([{"params": [parameter]}], OptimizerSection(lr=0.1))
        if state:
            load_optimizer_tensors_(optimizer, state, {parameter: "w"})
        for _ in range(steps):
            parameter.grad = torch.sin(parameter.detach() + torch.arange(4))
            optimizer.step()
        return parameter.detach(), optimizer_tensors(optimizer, {parameter: "w"})

    whole, _ = trained(6)
    half, state = trained(3)
    assert set(state) == {"w/step", "w/exp_avg", "w/exp_avg_sq"}
    resumed, _ = trained(3, {key: value.clone() for key, value in state.items()}, half)
    assert torch.equal(whole, resumed)
    with pytest.raises(ValueError, match="'v', which this run does not train"):
        load_optimizer_tensors_(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), {"v/step": torch.ones(())}, {})


@pytest.mark.parametrize("narrow", [False, True])
def test_matrices_decay_and_vectors_do_not(narrow):
    matrix, vector = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
    section = OptimizerSection(lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(decayed([vector, matrix]), section, narrow=narrow)
    matrix.grad, vector.grad = torch.zeros(3, 2), torch.zeros(3)
    optimizer.step()
    assert torch.equal(vector, torch.ones_like(vector))
    torch.testing.assert_close(matrix.float(), torch.full((3, 2), 0.95), rtol=2**-8, atol=0)


DORA = ["adapter.rank=2", "adapter.use_dora=true"]


@pytest.mark.parametrize("more", [[], DORA, [*DORA, "adapter.lora_plus_ratio=4"]])
def test_what_a_run_decays(words, more):
    from tt_train.build import load_model, trainable_groups
    from tt_train.job import assemble

    job = assemble(compose("sft", overrides=[*words, *more]))
    model = load_model(job)
    groups = trainable_groups(job, model)
    decay = {id(p): group.get("weight_decay", 0.01) for group in groups for p in group["params"]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(decay) == len(trained)
    assert all((decay[id(parameter)] > 0) == (parameter.dim() > 1) for parameter in trained)
    assert {parameter.dim() for parameter in trained} == {1, 2}
