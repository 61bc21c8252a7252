"""``tt plan``: what a run will need, before anything loads."""

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tt_cli.group import ConfigVerb
from tt_cli.names import composed
from tt_cli.options import Number, config_words, json_option
from tt_cli.terminal import print_json, tell
from tt_train.errors import counted

if TYPE_CHECKING:
    from tt_train.config import RunConfig
    from tt_train.job import Job
    from tt_train.models.plan import Measured, Plan

_SCALES = {"": 1.0, "G": 1e9, "T": 1e12, "P": 1e15}
_ABOUT = {
    "weights": "weights of the model, and of frozen models beside it",
    "gradients": "gradients of what trains, in fp32",
    "optimizer": "state of the optimizer, the bits that bf16 weights lack, and some in fp32 while it runs",
    "activations": "what the backward pass needs, and the gradients on their way",
    "logits": "logits and gradients of the loss",
    "allocator": "libraries, and freed memory that the process keeps",
}


def _bytes(_ctx: click.Context, _param: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:  # 24 alone would be 24 bytes, and 24G may mean either
        raise click.BadParameter(f"expected a size with a unit, such as 24GiB (2**30) or 80GB (10**9), got {text!r}")
    unit: int = (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
    return round(float(found[1]) * unit)


def _flops(_ctx: click.Context, _param: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) ?([GTP]?)(?:FLOPS?|FLOP/s)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise click.BadParameter(f"expected operations per second such as 300T or 3e14, got {text!r}")
    return float(found[1]) * _SCALES[found[2].upper()]


@click.command(
    "plan",
    cls=ConfigVerb,
    examples=[
        "tt plan sft model.path=Qwen/Qwen3-0.6B data.train=rows.jsonl adapter.rank=8",
        "tt plan my.yaml --memory 24GiB --gpu --nproc 4",
        "tt plan my.yaml --measure",
    ],
)
@config_words()
@click.option("--nproc", metavar="N", type=Number(click.IntRange(1, 2**16)), default=1, show_default=True,
              help="Number of processes; memory is that of one of them.")  # fmt: skip
@click.option("--memory", metavar="SIZE", callback=_bytes,
              help="Find the largest micro_batch_size that fits: 24GiB (of 2**30 bytes) or 80GB (10**9).")  # fmt: skip
@click.option("--gpu", is_flag=True, help="Plan for a GPU, although the run's device on this machine is a CPU.")
@click.option("--flops", metavar="RATE", callback=_flops,
              help="Operations per second that a process achieves, such as 300T: gives the time.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Load the weights and make 3 steps on this machine, for the time.")
@json_option
def command(
    what: str,
    overrides: tuple[str, ...],
    config_file: str | None,
    allow_import: tuple[str, ...],
    nproc: int,
    memory: int | None,
    gpu: bool,
    flops: float | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Show what a run will need: parameters, memory by part, steps and time.

    The model's code runs on shapes without numbers, for the largest micro-batch among the first steps of the real rows.
    No weights load, unless --measure is given.
    """
    if measure and nproc > 1:
        raise click.UsageError("--measure makes its steps in one process; leave out --nproc")
    config = composed(what, config_file, overrides, allow_import, devices=nproc)
    from tt_train.job import assemble
    from tt_train.models.plan import kind_of, largest_micro_batch, plan
    from tt_train.models.plan import measure as measured_by

    job = assemble(config, rows=kind_of(config), elsewhere=None if measure else nproc)
    cpu = False if gpu else None
    found = plan(job, ranks=nproc, cpu=cpu)
    savings = _savings(job, found, what=what, words=(overrides, config_file, allow_import), cpu=cpu)
    fitting = None if memory is None else largest_micro_batch(job, memory, ranks=nproc, cpu=cpu)
    measured = measured_by(job) if measure else None
    seconds: float | None = None
    if measured is not None:
        seconds = found.steps * measured.seconds
    elif flops is not None:
        seconds = found.steps * found.flops / nproc / flops
    if as_json:
        print_json(_as_data(found, savings, fitting, measured, seconds))
        return
    for note in job.notes:
        tell(note)
    for line in _lines(found, savings, memory, fitting, measured, seconds):
        click.echo(line)


def _savings(
    job: "Job[RunConfig]", found: "Plan", *, what: str, words: tuple[Any, ...], cpu: bool | None
) -> list[tuple[str, int]]:
    """What each switch that is left would save, the most first; not what is less than a hundredth of the tensors."""
    from tt_train.models.plan import plan, switches, with_config

    overrides, config_file, allow_import = words
    rows: list[tuple[str, int]] = []
    for word in switches(job.config):
        other = with_config(job, composed(what, config_file, (*overrides, word), allow_import, devices=found.ranks))
        rows.append((word, found.peak.total - plan(other, ranks=found.ranks, cpu=cpu).peak.total))
    least = (found.peak.total - found.peak.parts["allocator"]) // 100
    return sorted((row for row in rows if row[1] > least), key=lambda row: -row[1])


def _as_data(
    found: "Plan",
    savings: list[tuple[str, int]],
    fitting: int | None,
    measured: "Measured | None",
    seconds: float | None,
) -> dict[str, Any]:
    return {
        "parameters": found.parameters, "trained": found.trained, "ranks": found.ranks,
        "memory": {**found.peak.parts, "total": found.peak.total},
        "batch": {"rows": found.batch[0], "tokens_per_row": found.batch[1]},
        "switches": [{"set": word, "saves": size} for word, size in savings], "largest_micro_batch_size": fitting,
        "steps": found.steps, "tokens_per_step": round(found.tokens), "flops_per_step": round(found.flops),
        "measured": measured and asdict(measured), "seconds": seconds,
    }  # fmt: skip


def _lines(
    found: "Plan",
    savings: list[tuple[str, int]],
    memory: int | None,
    fitting: int | None,
    measured: "Measured | None",
    seconds: float | None,
) -> list[str]:
    share = 100 * found.trained / found.parameters
    rows, length = found.batch
    each = f" on each of {found.ranks} processes" if found.ranks > 1 else ""
    lines = [
        f"{found.parameters:,} parameters, {found.trained:,} trained ({share:.3g} %)",
        f"memory at the peak{each}, with {rows} x {length:,} tokens at a time:",
        *(f"  {size / 2**30:9.2f} GiB  {part}: {_ABOUT[part]}" for part, size in found.peak.parts.items() if size),
        f"  {found.peak.total / 2**30:9.2f} GiB  in all",
    ]
    if savings:
        lines += ["what would save memory:"]
        lines += [f"  {size / 2**30:9.2f} GiB  {word}" for word, size in savings]
    if memory is not None:
        what = f"micro_batch_size={fitting} is the largest that fits" if fitting else "not even micro_batch_size=1 fits"
        lines.append(f"{what} into {memory / 2**30:.4g} GiB{each}")
    steps = counted(found.steps, "step")
    lines.append(f"{steps} of about {found.tokens:,.0f} tokens, {found.flops:.3g} operations each")
    if measured:
        lines.append(f"measured: {measured.seconds:.3g} s a step, {measured.growth / 2**30:.2f} GiB more at the peak")
    if seconds is not None:
        lines.append(f"time: about {_duration(seconds)}, without evaluations")
    return lines


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
