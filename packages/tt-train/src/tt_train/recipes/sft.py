"""Supervised fine-tuning, full or with an adapter: read from top to bottom, this is what ``tt run sft`` does."""

import time
from pathlib import Path

import torch

import tt_ckpt
import tt_data
from tt_train.build import load_model, make_objective, trainable_groups
from tt_train.config import RunConfig, SFTConfig
from tt_train.errors import TrainingError
from tt_train.evaluate import to_device
from tt_train.job import Job, assemble
from tt_train.keys.mistakes import refuse_mistakes
from tt_train.keys.paths import absolute
from tt_train.memory import explaining_memory
from tt_train.optim import learning_rate, make_optimizer, set_learning_rate
from tt_train.run.checkpoints import TrainingState
from tt_train.run.console import Console
from tt_train.run.dir import RunDir
from tt_train.run.finish import finish
from tt_train.run.loop import Watch
from tt_train.run.metrics import open_loggers, peak_memory_gib
from tt_train.run.resume import check_destination
from tt_train.run.start import before_steps, begin, opening_facts
from tt_train.run.stop import StopRequest
from tt_train.step import StepResult, train_step

Config = SFTConfig


def main(
    config: RunConfig, *, console: Console | None = None, resume: str | Path | None = None, dry_run: bool = False
) -> Path:
    """Train, and return the run directory.

    Args:
        config: what ``tt_train.compose`` gives.
        console: what is told while it runs; plain lines on stderr by default.
        resume: ``auto`` continues the run at ``output_dir``, or the newest unfinished one with this config, if there
            is one; a path names the run or one of its checkpoints, from which another ``output_dir`` begins a new run.
        dry_run: stop before the first step, after everything has been loaded and shown.

    Raises:
        ConfigError: a mistake to correct. TrainingError: a non-finite loss. Interrupted: a signal, after saving.
    """
    console = console or Console()
    refuse_mistakes(config)  # of a config made by code
    config = absolute(config)
    check_destination(config, resume)  # before rows are read
    job = assemble(config)
    for note in job.notes:
        console.note(note)
    if dry_run:
        console.start(opening_facts(job, load_model(job), Path(config.output_dir or "runs"), 0))
        return Path(config.output_dir or "runs")
    opened = begin(job, resume, console)
    if isinstance(opened, Path):  # a finished run
        return opened
    run, saved = opened
    with run:
        train(job, run, saved, console)
    return run.path


def train(job: Job, run: RunDir, saved: tt_ckpt.TrainState | None, console: Console) -> None:
    """Run the steps that the checkpoint ``saved`` leaves, and write the results."""
    config = job.config
    with StopRequest(checkpoint=str(saved.path) if saved else None, step=saved.step if saved else 0) as stop:
        with stop.at_once():  # nothing is lost before the first step
            model = load_model(job)
            objective = make_objective(config)
            groups, narrow = trainable_groups(job, model), job.lora is None and job.dtype == torch.bfloat16
            optimizer = make_optimizer(groups, config.optimizer, narrow=narrow)
            state = TrainingState(run, job, model, optimizer)
            if saved is not None:
                state.restore(saved)
        before_steps(job, run, state, saved, console)
        # from here on, whatever ends the run early leaves a checkpoint of the last whole step
        with state.kept(console.warn), open_loggers(config, run, state.step) as loggers:
            watch = Watch(
                job=job, run=run, state=state, objective=objective, loggers=loggers, console=console, stop=stop
            )
            if state.row is not None and not state.complete:
                watch.record()  # the evaluation before step 1, or one that a signal cut off
            run_steps(job, watch)
            finish(job, run, watch)


def run_steps(job: Job, watch: Watch) -> None:
    """The loop. What the last step leaves to be recorded is up to ``finish``: the result comes first."""
    config, state, optimizer = job.config, watch.state, watch.state.optimizer
    batches = tt_data.batches(
        job.train, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, seed=config.seed,
        start_step=state.step, num_workers=config.data.num_workers, shuffle=config.data.shuffle,
        pad_id=job.tokenizer.pad_id, timeout_s=config.data.worker_timeout_s,
    )  # fmt: skip
    while not state.complete:
        step, began = state.step + 1, time.perf_counter()
        torch.manual_seed((config.seed * 1_000_003 + step) % 2**64)  # dropout depends on seed and step alone
        rate = learning_rate(config.schedule, base=config.optimizer.lr, step=step - 1, steps_total=job.steps_total)
        set_learning_rate(optimizer, rate)
        micro_batches = [to_device(batch, job.device) for batch in next(batches)]
        with explaining_memory(micro_batches, lambda: peak_memory_gib(job.device)):
            result = train_step(
                state.model, micro_batches, watch.objective, optimizer, max_grad_norm=config.max_grad_norm
            )
        if not result.updated and config.on_nonfinite == "stop":
            raise TrainingError(not_finite(step, result, job))
        state.made(step, result, rate=rate)
        if not result.updated:
            watch.console.warn(f"{not_finite(step, result, job)}; skipped")
        watch.measure(tokens=result.tokens, seconds=time.perf_counter() - began)
        watch.stop.check()
        if step < job.steps_total:
            improved = watch.record()
            state.save_if_due(improved=improved, warn=watch.console.warn)
            watch.stop.check()
    if state.step < job.steps_total:
        watch.console.note(
            f"stopped early after step {state.step}: {state.evaluations_since_best} evaluations without a lower "
            f"held-out loss than {state.best['eval_loss'] if state.best else float('nan'):.4f}"
        )


def not_finite(step: int, result: StepResult, job: Job) -> str:
    """What is known about a step whose update would have spoiled the weights."""
    return (
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm} (in {result.first_nonfinite}) are not "
        f"finite; the weights were left alone. Look at {job.rows_of(step)} with tt data show, or lower optimizer.lr"
    )
