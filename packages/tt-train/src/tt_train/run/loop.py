"""What every recipe's loop is made of: the steps, what is measured beside them, and what follows each one."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import tt_data
from tt_train.config import RunConfig
from tt_train.devices.distributed import world
from tt_train.errors import TrainingError, counted
from tt_train.evaluate import answer, held_out_figures, to_device
from tt_train.inputs.questions import questions
from tt_train.inputs.rows import count_rows
from tt_train.job import Job
from tt_train.losses.cross_entropy import Batch, Objective
from tt_train.memory import compile_seconds, memory_gib
from tt_train.records.series import SERIES
from tt_train.run.checkpoints import TrainingState, finite_or_none
from tt_train.run.compare import STREAM, chained, digest_of
from tt_train.run.console import Console, held_out_line
from tt_train.run.dir import RunDir
from tt_train.run.exact_match import exact_match
from tt_train.run.loggers import Logger
from tt_train.run.mfu import count_tokens, flops_per_token, peak_flops
from tt_train.run.profile import Profile
from tt_train.run.stop import StopRequest
from tt_train.step import StepResult

log = logging.getLogger("tt_train")
_KEYS = tuple(one.name for one in SERIES.values() if not one.optional and one.name != "eval_loss")  # of every row


@dataclass(kw_only=True)
class Metrics:
    """The figures of a run: measured after each step, and written to metrics.jsonl, the loggers and the console.

    prompts: what ``tt_train.evaluate.prompts`` gives, to be answered at every evaluation. prepare: what the recipe does
    with the batches of a step before ``train_step``, and here with all held-out ones at once. A signal that comes while
    held-out rows are evaluated or prompts answered is obeyed at once: that work is made again when the run is resumed.
    """

    job: Job[RunConfig]
    run: RunDir
    state: TrainingState
    objective: Objective
    prompts: Sequence[dict[str, Any]]
    loggers: Sequence[Logger]
    console: Console
    stop: StopRequest
    prepare: Callable[[Sequence[Batch]], Sequence[Batch]] = list
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first, self.elapsed_before = self.state.step, self.state.elapsed_s
        self.step_began = self.began
        self.rows_digest = 0  # of this rank's rows in this step
        self.all_tokens = 0  # of this rank's rows in this step
        self.flops = flops_per_token(self.state.model)
        self.peak = peak_flops(self.job.device, self.job.dtype)
        self.profile: Profile | None = None
        held_out, num = self.job.held_out, self.job.config.samples.exact_match
        self.questions = questions(held_out, self.job.tokenizer, num=num) if held_out is not None else []

    def measure(self, *, tokens: int) -> None:
        """Add what the step that was just made took: its time, memory, and ``tokens``, those that train, per second."""
        state, per_epoch, now = self.state, self.job.steps_per_epoch, time.perf_counter()
        assert state.row is not None
        state.elapsed_s = round(self.elapsed_before + now - self.began, 3)
        taken = now - self.step_began
        if is_logged(self.job, state.step):
            state.row |= self._of_all_tokens(taken)
        state.row |= {
            "epoch": round(state.step / per_epoch, 4) if per_epoch else None,
            "tokens_per_s": round(tokens / taken, 2),
            **_memory_figures(self.job.device),
            "elapsed_s": state.elapsed_s,
            "eta_s": round((now - self.began) / (state.step - self.first) * (self.job.steps_total - state.step), 1),
        }

    def _of_all_tokens(self, seconds: float) -> dict[str, float]:
        """The speed of all tokens of all ranks, and the utilization that it means, if a device's peak is known."""
        everybody = world()
        speed = float(everybody.sum(torch.tensor(float(self.all_tokens)))) / seconds
        figures = {"all_tokens_per_s": round(speed, 2)}
        if self.flops and self.peak:
            figures["mfu"] = round(self.flops * speed / (self.peak * everybody.size), 4)
        return figures

    def record(self, *, sample: bool = True) -> bool:
        """Evaluate and sample if that is due, and write the figures of the step. Returns whether its held-out loss is
        the lowest so far."""
        state, improved = self.state, False
        assert state.row is not None
        row = dict.fromkeys(_KEYS) | state.row
        due = is_due(self.job, state.step)
        if state.step == 0:
            self._say_what_comes_first(sample)
        if due:
            held_out = self.evaluate()
            row |= held_out
            improved = state.judge(held_out["eval_loss"])
        if sample and (due or state.step == 0):
            self.sample()
        if is_logged(self.job, state.step):
            self._write(row)
            self.console.step(row)
            known = (math.nan if row[key] is None else row[key] for key in ("loss", "grad_norm"))
            log.info("step %d loss %.6f grad_norm %.4f", state.step, *known)
        elif due:
            self._write(row | {"tokens": 0, "elapsed_s": 0.0})
            self.console.note(f"before step 1: {held_out_line(row)}")
        state.row = None
        return improved

    def _say_what_comes_first(self, sample: bool) -> None:
        """What takes its time before step 1, and shows nothing meanwhile."""
        rows = count_rows(self.job.held_out) if self.job.held_out is not None else None
        what = [f"evaluating {counted(rows, 'held-out row')}"] if rows is not None else []
        what += [f"asking {len(self.questions)} of them"] if self.questions else []
        what += [f"answering {counted(len(self.prompts), 'prompt')}"] if sample and self.prompts else []
        if what:
            self.console.note(f"before step 1: {' and '.join(what)} ...")

    def _write(self, row: dict[str, Any]) -> None:
        figures = {key: finite_or_none(value) for key, value in row.items()}
        self.run.append("metrics.jsonl", {**figures, STREAM: self.state.token_stream})
        for logger in self.loggers:
            logger(row)

    def evaluate(self) -> dict[str, float]:
        """``eval_loss``, the mean over every trained token held out, and further figures."""
        job, config = self.job, self.job.config
        with self.stop.at_once():
            figures = held_out_figures(
                self.state.model, job.held_out, self.objective, pad_id=job.tokenizer.pad_id,
                micro_batch_size=config.micro_batch_size, device=job.device, prepare=self.prepare,
            )  # fmt: skip
            if self.questions:
                figures |= exact_match(
                    self.state.model, job.tokenizer, self.questions, device=job.device,
                    tokens_at_once=config.micro_batch_size * config.data.max_seq_len,
                )  # fmt: skip
        return figures

    def sample(self) -> None:
        """Answers to the prompts, into samples.jsonl."""
        with self.stop.at_once():
            rows = answer(
                self.state.model, self.job.tokenizer, self.prompts, device=self.job.device,
                max_new_tokens=self.job.config.samples.max_new_tokens,
            )  # fmt: skip
        about = {"step": self.state.step, "held_out": self.job.held_out is not None}
        self.run.append("samples.jsonl", *(about | row for row in rows))


def is_due(job: Job[RunConfig], step: int) -> bool:
    """Whether held-out rows are evaluated after ``step``: before the first, every ``eval_every``, and at the end."""
    if job.held_out is None:
        return False
    every = job.config.eval_every
    return step in (0, job.steps_total) or (every is not None and step % every == 0)


def _memory_figures(device: torch.device) -> dict[str, float]:
    """The peaks so far: ``memory_gib``, allocated, and what else a device's allocator knows."""
    peaks = {kind: round(value, 4) for kind, value in memory_gib(device).items()}
    return {"memory_gib" if kind == "allocated" else f"memory_{kind}_gib": value for kind, value in peaks.items()}


def is_logged(job: Job[RunConfig], step: int) -> bool:
    """Whether the figures of ``step`` are written: every ``log_every`` steps, at evaluations and at the last step."""
    return step > 0 and (step % job.config.log_every == 0 or step == job.steps_total or is_due(job, step))


def steps(metrics: Metrics) -> Iterator[tuple[int, list[Batch]]]:
    """(number, counted from 1; micro-batches on the device) of each step that is left, until the run is complete.

    What was measured before the first of them is recorded first: the evaluation before step 1, or one that a signal
    cut off. The random numbers of a step, which dropout needs, depend on the seed, its number and the rank alone.
    """
    job, state, config, here = metrics.job, metrics.state, metrics.job.config, world()
    if state.row is not None and not state.complete:
        metrics.record()
    batches = tt_data.batches(
        job.train, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, seed=config.seed,
        rank=here.rank, world_size=here.size, start_step=state.step, num_workers=config.data.num_workers,
        shuffle=config.data.shuffle, pad_id=job.tokenizer.pad_id, timeout_s=config.data.worker_timeout_s,
    )  # fmt: skip
    if config.profile is not None and here.is_main:
        metrics.profile = Profile(
            config.profile, metrics.run.path, job.device, after=state.step, say=metrics.console.note
        )
    try:
        while not state.complete:
            metrics.step_began = time.perf_counter()
            torch.manual_seed((config.seed * 1_000_003 + state.step + 1 + (here.rank << 40)) % 2**64)
            micro_batches = next(batches)
            metrics.rows_digest = digest_of(micro_batches, pad_id=job.tokenizer.pad_id)
            metrics.all_tokens = sum(count_tokens(batch, pad_id=job.tokenizer.pad_id) for batch in micro_batches)
            if metrics.profile is not None:
                metrics.profile.begin(state.step + 1)
            yield state.step + 1, [to_device(batch, job.device) for batch in micro_batches]
    finally:
        if metrics.profile is not None:
            metrics.profile.close()


def after_step(metrics: Metrics, step: int, result: StepResult, *, lr: float) -> None:
    """Count the step; then record, evaluate, sample and save what is due, and obey a signal.

    The last step is recorded by ``finish``, which writes the result first.

    Raises:
        TrainingError: the step was not finite, and ``on_nonfinite`` is ``stop``. Stopped: a signal has come.
    """
    job, state, console = metrics.job, metrics.state, metrics.console
    if metrics.profile is not None:
        metrics.profile.end(step)
    if result.outcome == "not_finite" and job.config.on_nonfinite == "stop":
        raise TrainingError(_not_finite(step, result, job))
    if taken := sorted(result.metrics.keys() & SERIES.keys()):
        raise TrainingError(f"loss: names the metric {taken[0]}, which every run has; give yours a different name")
    state.made(step, result, lr=lr)
    if state.token_stream is not None:
        state.token_stream = chained(state.token_stream, int(world().sum(torch.tensor(metrics.rows_digest))))
    if result.outcome == "not_finite":
        console.warn(f"{_not_finite(step, result, job)}; skipped")
    elif result.outcome == "empty":
        console.note(f"step {step}: nothing to train on in {job.rows_of(step)}; the weights were left alone")
    metrics.measure(tokens=result.tokens)
    if job.config.compile and step == metrics.first + 1:
        console.note(f"compiling took {compile_seconds():.1f} s of step {step}")
    metrics.stop.check()
    if step < job.steps_total:
        state.save_if_due(improved=metrics.record(), warn=console.warn)
        metrics.stop.check()


def _not_finite(step: int, result: StepResult, job: Job[RunConfig]) -> str:
    """What is known about a step whose update would have spoiled the weights."""
    where = f" on rank {', '.join(map(str, result.ranks))}" if result.ranks and world().size > 1 else ""
    name = f" (in {result.first_nonfinite})" if result.first_nonfinite else ""
    weights = "some weights were updated before" if result.half_done else "the weights were left alone"
    return (
        f"step {step}{where}: loss {result.loss}, gradient norm {result.grad_norm}{name} are not finite; {weights}. "
        f"Look at {job.rows_of(step)} with tt data show, or lower optimizer.lr"
    )
