"""Supervised fine-tuning, full or with an adapter: read from top to bottom, this is what ``tt run sft`` does."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

import tt_data
from tt_train.config import SFTConfig, to_dict
from tt_train.console import Console
from tt_train.errors import Interrupted, TrainingError
from tt_train.evaluate import answer, held_out_loss, prompts, to_device
from tt_train.memory import explaining_memory
from tt_train.metrics import open_loggers, peak_memory_gib
from tt_train.optim import learning_rate, make_optimizer, set_learning_rate
from tt_train.recipes._assemble import Job, assemble
from tt_train.recipes._begin_and_end import begin, finish, opening_facts, with_absolute_paths
from tt_train.recipes._model import load_model, make_objective, trainable_groups
from tt_train.resume import TrainingState
from tt_train.run_dir import RunDir
from tt_train.step import StepResult, train_step
from tt_train.stop import StopRequest

Config = SFTConfig
log = logging.getLogger("tt_train.sft")


def main(
    config: SFTConfig, *, console: Console | None = None, resume: str | Path | None = None, dry_run: bool = False
) -> Path:
    """Train, and return the run directory.

    Args:
        config: what ``tt_train.config.compose`` gives.
        console: what is told while it runs; plain lines on stderr by default.
        resume: ``auto`` goes on with the run at ``output_dir``, or the newest unfinished one with this config, where
            there is one; a path names the run.
        dry_run: stop before the first step, after everything has been loaded and shown.

    Raises:
        ConfigError: a mistake to mend. TrainingError: a non-finite loss. Interrupted: a signal, after saving.
    """
    console = console or Console()
    job = assemble(with_absolute_paths(config))
    for note in job.notes:
        console.note(note)
    if dry_run:
        console.start(opening_facts(job, load_model(job), Path(config.output_dir or "runs"), 0))
        return Path(config.output_dir or "runs")
    run, checkpoint = begin(job, resume)
    with run:
        train(job, run, checkpoint, console)
    return run.path


def train(job: Job, run: RunDir, checkpoint: Path | None, console: Console) -> None:
    """Run the steps that ``checkpoint`` leaves, and write the results."""
    config = job.config
    model = load_model(job)
    objective = make_objective(config)
    optimizer = make_optimizer(trainable_groups(job, model), config.optimizer)
    state = TrainingState(run, job, model, optimizer)
    first, progress = state.restore(checkpoint) if checkpoint else (0, {})
    if config.save_every:
        state.check_space()
    facts = opening_facts(job, model, run.path, first)
    run.update_manifest(parameters=facts.parameters, trainable=facts.trainable)
    console.start(facts)
    run.keep_until(first)

    loggers = open_loggers(config.loggers, run.path, to_dict(config))
    tokens, before = progress.get("tokens", 0), progress.get("elapsed_s", 0.0)
    steps_total, per_epoch = job.steps_total, job.steps_per_epoch
    asked = prompts(job.rows_to_show, job.tokenizer, num=config.samples.num, max_prompt=config.data.max_seq_len)

    def sample(step: int) -> None:
        for row in answer(model, job.tokenizer, asked, max_new_tokens=config.samples.max_new_tokens, device=job.device):
            run.append("samples.jsonl", {"step": step, "held_out": job.held_out is not None, **row})

    if first == 0:
        sample(0)
    batches = tt_data.batches(
        job.train, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size, seed=config.seed,
        start_step=first, num_workers=config.data.num_workers, shuffle=config.data.shuffle, pad_id=job.tokenizer.pad_id,
    )  # fmt: skip
    started = time.perf_counter()
    with StopRequest() as stop:
        for step in range(first + 1, steps_total + 1):
            began = time.perf_counter()
            torch.manual_seed((config.seed * 1_000_003 + step) % 2**64)  # dropout hangs on seed and step alone
            rate = learning_rate(config.schedule, base=config.optimizer.lr, step=step - 1, steps_total=steps_total)
            set_learning_rate(optimizer, rate)
            micro_batches = [to_device(batch, job.device) for batch in next(batches)]
            with explaining_memory(micro_batches, lambda: peak_memory_gib(job.device)):
                result = train_step(model, micro_batches, objective, optimizer, max_grad_norm=config.max_grad_norm)
            if not result.updated and config.on_nonfinite == "stop":
                raise TrainingError(not_finite(step, result, job))
            tokens += result.tokens
            now = time.perf_counter()
            row: dict[str, Any] = {
                "step": step, "epoch": round(step / per_epoch, 4) if per_epoch else None, "loss": result.loss,
                "lr": rate, "grad_norm": result.grad_norm, "tokens": tokens,
                "tokens_per_s": round(result.tokens / (now - began), 2),
                "memory_gib": round(peak_memory_gib(job.device), 4), "elapsed_s": round(before + now - started, 3),
                "eta_s": round((now - started) / (step - first) * (steps_total - step), 1),
            }  # fmt: skip
            if not result.updated:
                console.warn(f"{not_finite(step, result, job)}; skipped")
            if job.held_out and (step == steps_total or (config.eval_every and step % config.eval_every == 0)):
                row["eval_loss"] = held_out_loss(
                    model, job.held_out, objective, micro_batch_size=config.micro_batch_size,
                    pad_id=job.tokenizer.pad_id, device=job.device,
                )  # fmt: skip
                if step < steps_total:
                    sample(step)
            run.append("metrics.jsonl", {key: None if _is_nan(value) else value for key, value in row.items()})
            for logger in loggers:
                logger(row)
            console.step(row)
            log.info("step %d loss %.6f grad_norm %.4f", step, result.loss, result.grad_norm)
            progress = {"tokens": tokens, "elapsed_s": row["elapsed_s"]}
            state.check(console.warn)
            if stop.signal is not None:
                raise Interrupted(stop.signal, str(state.save(step, progress)), step)
            if config.save_every and (step % config.save_every == 0 or step == steps_total):
                state.try_to_save(step, progress, console.warn)
    state.drain(console.warn)
    sample(steps_total)
    console.end(finish(run, job, model))


def not_finite(step: int, result: StepResult, job: Job) -> str:
    """What is known about a step whose update would have spoiled the weights."""
    return (
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm} (in {result.first_nonfinite}) are not "
        f"finite; the weights were left alone. Look at {job.rows_of(step)} with tt data show, or lower optimizer.lr"
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
