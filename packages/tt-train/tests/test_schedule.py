"""Learning rates against transformers' schedulers, and what the length of a run makes of them."""

import pytest
import torch

import tt_train
from tt_train import ConfigError, compose
from tt_train.config import ScheduleSection
from tt_train.optim.schedule import learning_rate, rate_change, schedule_mistakes, schedule_notes, warmup_steps

SHAPES = {
    "constant": ({}, "constant_with_warmup", {}),
    "linear": ({}, "linear", {}),
    "cosine": ({}, "cosine", {}),
    "cosine, two waves": ({"num_cycles": 1.5}, "cosine", {"num_cycles": 1.5}),
    "cosine, floor": ({"min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "wsd": ({"decay_steps": 6}, "warmup_stable_decay", {"num_decay_steps": 6}),
    "wsd, waves": ({"decay_steps": 9, "num_cycles": 1.5}, "warmup_stable_decay",
                   {"num_decay_steps": 9, "num_cycles": 1.5}),
    "wsd, floor": ({"decay_ratio": 0.25, "decay": "linear", "min_lr_ratio": 0.2}, "warmup_stable_decay",
                   {"num_decay_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.2}),
    "wsd, root": ({"decay_steps": 20, "decay": "1-sqrt"}, "warmup_stable_decay",
                  {"num_decay_steps": 20, "decay_type": "1-sqrt"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_schedule_is_that_of_transformers_but_for_a_first_step_that_trains(shape, warmup):
    transformers = pytest.importorskip("transformers")
    ours, name, theirs = SHAPES[shape]
    steps = warmup + 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    options = {"num_warmup_steps": warmup, "num_training_steps": steps, "scheduler_specific_kwargs": theirs}
    reference = transformers.get_scheduler(name, optimizer, **options)
    section = ScheduleSection(name=shape.partition(",")[0], warmup_steps=warmup, **ours)
    if "decay_ratio" in ours:
        section.decay_ratio = 5 / steps
    for step in range(steps):
        ours, theirs = learning_rate(section, base=0.5, step=step, steps_total=steps), reference.get_last_lr()[0]
        if step < warmup:  # theirs begins with a step at rate 0, or at the floor
            assert ours == pytest.approx(0.5 * (step + 1) / (warmup + 1), abs=1e-12)
        else:
            assert ours == pytest.approx(theirs, abs=1e-12)
        optimizer.step()
        reference.step()


def test_learning_rate_is_public():
    assert tt_train.learning_rate is learning_rate
    assert "learning_rate" in tt_train.__all__


def test_a_decay_that_does_not_fit_behind_the_warm_up_is_refused_before_weights_load(words):
    from tt_train.job import assemble

    wsd = ScheduleSection(name="wsd", warmup_steps=3, decay_steps=4)
    assert schedule_mistakes(wsd, 7) == []
    assert "3 steps of warm-up and 4 of decay are more than the run's 6 steps" in schedule_mistakes(wsd, 6)[0]
    more = ["schedule.name=wsd", "schedule.decay_steps=5", "schedule.warmup_steps=2"]
    with pytest.raises(ConfigError, match="schedule.decay_steps: 2 steps of warm-up"):
        assemble(compose("sft", overrides=[*words, *more]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schedule.decay_steps=3"], "schedule.decay_steps: a cosine schedule has none; use schedule.name=wsd"),
        (["schedule.name=linear", "schedule.num_cycles=2"], "schedule.num_cycles: a linear schedule has none"),
        (["schedule.name=wsd", "schedule.decay=linear", "schedule.num_cycles=2"], "schedule.num_cycles: a wsd"),
        (["schedule.name=wsd", "schedule.decay_steps=3", "schedule.decay_ratio=0.1"], "are both given"),
        (["schedule.name=wsd", "schedule.decay_steps=0"], "schedule.decay_steps: must be at least 1, got 0"),
        (["schedule.name=wsd", "schedule.decay=sqrt"], "schedule.decay: expected one of cosine, linear, 1-sqrt"),
        (["schedule.num_cycles=0"], "schedule.num_cycles: must be positive"),
        (["schedule.name=warmup_stable_decay"], "did you mean 'wsd'?"),
    ],
)
def test_a_key_that_the_schedule_has_no_use_for_is_refused(words, said):
    with pytest.raises(ConfigError) as caught:
        compose("sft", overrides=["model.path=m", "data.train=d", *words])
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
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
