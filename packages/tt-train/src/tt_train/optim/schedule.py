"""The learning rate as a pure function of the step, and what the length of a run makes of it."""

import math

from tt_train.config import RunConfig, ScheduleSection
from tt_train.errors import counted

DEFAULT_WARMUP_RATIO = 0.03
DEFAULT_DECAY_RATIO = 0.1


def learning_rate(section: ScheduleSection, *, base: float, step: int, steps_total: int) -> float:
    """The learning rate of ``step`` (counted from 0) in a run of ``steps_total`` steps.

    Warm-up rises by equal parts of ``base``, from ``base / (w + 1)`` at step 0 to ``base`` at step ``w``. From then on
    this is transformers' get_scheduler: ``constant`` stays; ``linear`` and ``cosine`` fall until ``steps_total``;
    ``wsd`` (warm-up, stable, decay: https://arxiv.org/abs/2405.18392) stays, and falls over its last ``decay_steps``.
    They end at ``min_lr_ratio * base``. Transformers' warm-up is ``base * step / w``, so that its first step is lost.
    """
    warmup = warmup_steps(section, steps_total)
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    if section.name == "constant":
        return base
    first = steps_total - decay_steps(section, steps_total) if section.name == "wsd" else warmup
    progress = min(1.0, max(0, step - first) / max(1, steps_total - first))
    shape = section.decay if section.name == "wsd" else section.name
    return base * (section.min_lr_ratio + (1 - section.min_lr_ratio) * _left(shape, progress, section.num_cycles))


def _left(shape: str, progress: float, num_cycles: float) -> float:
    """The share of the rate that is left, from 1 at ``progress`` 0."""
    if shape == "linear":
        return 1 - progress
    if shape == "1-sqrt":
        return 1 - math.sqrt(progress)
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress)))


def warmup_steps(section: ScheduleSection, steps_total: int) -> int:
    """How many steps come before the full rate: as given, else a share of the run that leaves it a full step."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    ratio = DEFAULT_WARMUP_RATIO if section.warmup_ratio is None else section.warmup_ratio
    return max(0, min(math.ceil(ratio * steps_total), steps_total - 1))


def decay_steps(section: ScheduleSection, steps_total: int) -> int:
    """Over how many steps at its end a wsd schedule falls: as given, else a share of the run, after the warm-up."""
    if section.decay_steps is not None:
        return section.decay_steps
    ratio = DEFAULT_DECAY_RATIO if section.decay_ratio is None else section.decay_ratio
    return max(0, min(math.ceil(ratio * steps_total), steps_total - warmup_steps(section, steps_total)))


def schedule_mistakes(section: ScheduleSection, steps_total: int) -> list[str]:
    """A line if the parts of a schedule are longer than the run."""
    warmup = warmup_steps(section, steps_total)
    if section.name != "wsd" or section.decay_steps is None or warmup + section.decay_steps <= steps_total:
        return []
    parts = f"{counted(warmup, 'step')} of warm-up and {section.decay_steps:,} of decay"
    run = counted(steps_total, "step")
    return [f"schedule.decay_steps: {parts} are more than the run's {run}; lower it, or use schedule.decay_ratio"]


def schedule_notes(config: RunConfig, steps_total: int) -> list[str]:
    """A line for each number of the config that a run of ``steps_total`` steps makes meaningless."""
    notes = []
    section, run = config.schedule, f"the run's {counted(steps_total, 'step')}"
    warmup = warmup_steps(section, steps_total)
    if warmup >= steps_total:
        base = config.optimizer.lr
        top = learning_rate(section, base=base, step=steps_total - 1, steps_total=steps_total)
        notes.append(
            f"schedule.warmup_steps: {warmup:,} is not below {run}, so the learning rate ends at {top:.3g} and never "
            f"reaches optimizer.lr {base:.3g}; lower it, or use schedule.warmup_ratio"
        )
    if section.min_lr_ratio and section.name == "constant":
        notes.append("schedule.min_lr_ratio: it has no effect on a constant schedule")
    if config.eval_every is not None and config.eval_every > steps_total:
        notes.append(f"eval_every: {config.eval_every:,} is beyond {run}; held-out loss is measured at the end only")
    if config.save_every is not None and config.save_every > steps_total:
        notes.append(
            f"save_every: {config.save_every:,} is beyond {run}; no checkpoint is written before the last step"
        )
    if config.max_steps is not None and config.epochs != 1:
        notes.append(
            f"epochs: {config.epochs} has no effect, max_steps ends the run after {counted(config.max_steps, 'step')}"
        )
    return notes


def rate_change(config: RunConfig, step: int, *, before: int, now: int) -> str | None:
    """What a run that was to have ``before`` steps, and has ``now``, changes at ``step`` (counted from 0); or None."""
    old, new = (
        learning_rate(config.schedule, base=config.optimizer.lr, step=step, steps_total=total)
        for total in (before, now)
    )
    if math.isclose(old, new, rel_tol=1e-9):
        return None
    steps = counted(now, "step")
    return (
        f"the schedule is stretched from {before:,} to {steps}: the learning rate of step {step + 1:,} is {new:.3g}, "
        f"it would have been {old:.3g}; this is not the curve of a run of {steps} from the start"
    )
