"""Preference tuning (DPO and its relatives), full or with an adapter: what ``tt run dpo`` does, from top to bottom."""

from functools import partial
from pathlib import Path

import tt_ckpt
from tt_train.build import build_optimizer, build_reference, load_model, preference_loss
from tt_train.config import DPOConfig, PreferenceSection
from tt_train.evaluate import prompts
from tt_train.job import Job, assemble
from tt_train.losses.answers import judged_objective, pair_objective
from tt_train.losses.cross_entropy import Objective
from tt_train.memory import explaining_memory
from tt_train.optim.optimizers import set_learning_rate
from tt_train.optim.schedule import learning_rate
from tt_train.references.reference import prepared
from tt_train.run.checkpoints import TrainingState
from tt_train.run.console import Console
from tt_train.run.dir import RunDir
from tt_train.run.finish import finish
from tt_train.run.loggers import open_loggers
from tt_train.run.loop import Metrics, after_step, steps
from tt_train.run.resume import check_destination
from tt_train.run.start import announce, opening_facts, start
from tt_train.run.stop import StopRequest
from tt_train.settings.keys.mistakes import refuse_mistakes
from tt_train.settings.keys.paths import absolute
from tt_train.step import train_step

Config = DPOConfig


def make_objective(loss: PreferenceSection) -> Objective:
    """What a step makes smaller: the mean over all its pairs, or over its judged answers for kto.

    For a loss of your own, copy this file (``tt cp dpo my_dpo.py``) and give ``loss=`` a function from
    ``tt_train.losses.preferences.Pairs`` to a loss for each pair: ``lambda pairs: pairs.rejected - pairs.chosen``.
    """
    objective = judged_objective if loss.name == "kto" else pair_objective
    return partial(objective, loss=preference_loss(loss), beta=loss.beta, sft_weight=loss.sft_weight)


def main(
    config: DPOConfig, *, console: Console | None = None, resume: str | Path | None = None, dry_run: bool = False
) -> Path:
    """Train, and return the run directory.

    Args:
        config: what ``tt_train.compose`` gives.
        console: shows progress; plain lines on stderr by default.
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
    job = assemble(config, rows="judged" if config.loss.name == "kto" else "pair")
    for note in job.notes:
        console.note(note)
    if dry_run:
        console.start(opening_facts(job, load_model(job), Path(config.output_dir or "runs"), 0))
        return Path(config.output_dir or "runs")
    opened = start(job, resume, console)
    if isinstance(opened, Path):  # a finished run
        return opened
    run, saved = opened
    with run:
        train(job, run, saved, console)
    return run.path


def train(job: Job[DPOConfig], run: RunDir, saved: tt_ckpt.TrainState | None, console: Console) -> None:
    """Make the steps that the checkpoint ``saved`` leaves, and write the results."""
    config = job.config
    with StopRequest(checkpoint=str(saved.path) if saved else None, step=saved.step if saved else 0) as stop:
        with stop.at_once():  # nothing is lost before the first step
            model = load_model(job)
            optimizer = build_optimizer(job, model)
            reference = build_reference(job, model, console.note)  # before a checkpoint is restored: the start
            objective = make_objective(config.loss)
            prepare = partial(prepared, model=model, loss=config.loss, reference=reference)
            state = TrainingState(run, job, model, optimizer)
            if saved is not None:
                state.restore(saved)
        announce(job, run, state, saved, console)
        # from here on, whatever ends the run early leaves a checkpoint of the last whole step
        with state.kept(console.warn), open_loggers(config, run, state.step, console) as loggers:
            asked = prompts(job.rows_to_show, job.tokenizer, num=config.samples.num, max_prompt=config.data.max_seq_len)
            metrics = Metrics(job=job, run=run, state=state, objective=objective, prompts=asked, loggers=loggers,
                              console=console, stop=stop, prepare=prepare)  # fmt: skip
            for step, micro_batches in steps(metrics):
                lr = learning_rate(
                    config.schedule, base=config.optimizer.lr, step=step - 1, steps_total=job.steps_total
                )
                set_learning_rate(optimizer, lr)
                with explaining_memory(micro_batches, job.device):
                    batches = prepare(micro_batches)  # with the reference's log-probabilities
                    result = train_step(model, batches, objective, optimizer, max_grad_norm=config.max_grad_norm)
                after_step(metrics, step, result, lr=lr)
            finish(metrics)
