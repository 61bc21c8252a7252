"""What comes before the loop of every recipe: a run directory, new or resumed, and what is said before step 1."""

import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tt_ckpt
from tt_train.config import RunConfig, to_dict, to_yaml
from tt_train.devices.distributed import world
from tt_train.devices.launch import decided, everywhere, is_restarted
from tt_train.errors import ConfigError
from tt_train.job import Job
from tt_train.optim.schedule import rate_change
from tt_train.records.run_files import TEMPLATE_FILE, FinishedRun
from tt_train.references.reference_cache import weights_of
from tt_train.run.checkpoints import TrainingState
from tt_train.run.console import Console, RunFacts
from tt_train.run.dir import RunDir
from tt_train.run.environment import collect, command_line, git_state
from tt_train.run.finish import data_facts, precision, result_bytes
from tt_train.run.lock import BEAT_S, STALE_S
from tt_train.run.resume import (
    Origin,
    changed_imports,
    changed_keys,
    find_origin,
    new_path,
    nothing_left,
    probe_writable,
    read_checkpoint,
)
from tt_train.run.serving import own_template
from tt_train.settings.recipe_file import copy_of
from tt_train.settings.registry import imports_of


def start(
    job: Job[RunConfig], resume: str | Path | None, console: Console
) -> tuple[RunDir, tt_ckpt.TrainState | None] | Path:
    """Open a new run directory, or the one to resume; also gives the checkpoint to restore, None to start anew.

    A Path is a run that is finished already. Whatever is refused is refused before anything is written. Of several
    ranks, rank 0 chooses and writes.
    """
    origin = decided(lambda: _origin(job, resume))
    if origin is None:
        return _new_run(job), None
    explicit = str(resume) != "auto"
    if not origin.in_place:
        saved = everywhere(lambda: read_checkpoint(job, origin, explicit=explicit))
        assert saved is not None  # explicit
        run = _new_run(job, continued_from={"run": str(origin.run.resolve()), "step": saved.step})
        run.take_rows(origin.run, saved.step)
        return run, saved
    if origin.checkpoint is None and (reason := decided(lambda: nothing_left(job, origin.run))):
        console.note(reason)
        return origin.run
    run = _opened(origin.run)
    try:
        saved = everywhere(lambda: read_checkpoint(job, origin, explicit=explicit))
        if saved is None:
            console.note(f"{run.path} has no checkpoint: training starts at step 1")
    except BaseException:
        run.close()
        raise
    return run, saved


def _origin(job: Job[RunConfig], resume: str | Path | None) -> Origin | None:
    """The run to resume, if its config still fits."""
    origin = find_origin(job.config, resume)
    if origin is None:
        return None
    before = FinishedRun(origin.run)
    if changed := changed_keys(before.config, job.config) + changed_imports(before.manifest, job.config):
        raise ConfigError(
            [f"--resume: {line}; a resumed run keeps this key: set it back, or start a new run" for line in changed]
        )
    return origin


def _new_run(job: Job[RunConfig], **more: Any) -> RunDir:
    run = _opened(decided(lambda: _free_path(job)))
    try:
        everywhere(lambda: _write_first_files(job, run, more))
    except BaseException:
        run.close()
        raise
    return run


def _free_path(job: Job[RunConfig]) -> Path:
    path = new_path(job.config.output_dir, job.base_model, job.method)
    probe_writable(path)
    return path


def _opened(path: Path) -> RunDir:
    """The run directory, whose lock rank 0 holds."""
    run = everywhere(lambda: _when_free(path))
    everywhere(run.check_shared)
    return run


def _when_free(path: Path) -> RunDir:
    # of a run that its launcher restarts, the old writer may be on another host, where it counts as alive for a while
    until = time.monotonic() + (STALE_S + BEAT_S if is_restarted() else 0.0)
    while True:
        try:
            return RunDir(path)
        except ConfigError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.5)


def _write_first_files(job: Job[RunConfig], run: RunDir, more: dict[str, Any]) -> None:
    run.write_text("config.yaml", to_yaml(replace(job.config, output_dir=None)))
    run.write_json("manifest.json", _manifest(job) | more)
    if (own := copy_of(job.config)) is not None:
        run.write_text(own.name, own.text)
    template = own_template(job.tokenizer, job.config.data.template)
    if template is not None:
        run.write_text(TEMPLATE_FILE, template)
    run.set_state("running")


def announce(
    job: Job[RunConfig], run: RunDir, state: TrainingState, saved: tt_ckpt.TrainState | None, console: Console
) -> None:
    """Check the disk, say what is about to happen, and cut the run's files back to the step that it starts from."""
    facts = opening_facts(job, state.model, run.path, state.step)
    everywhere(lambda: state.check_space(result_bytes(job, state)))
    before = saved.state["steps_total"] if saved is not None else job.steps_total
    if note := rate_change(job.config, state.step, before=before, now=job.steps_total):
        console.warn(note)
    console.start(facts)
    config = replace(job.config, output_dir=None)
    run.write_text("config.yaml", to_yaml(config))
    run.update_manifest(config=to_dict(config), parameters=facts.parameters, trainable=facts.trainable,
                        precision=facts.precision, steps_total=job.steps_total)  # fmt: skip
    run.set_state("running")
    rows = run.rows("metrics.jsonl", key=state.step)
    state.recorded(decided(lambda: next((row for row in rows if row["step"] == state.step), None)))
    run.keep_until(state.step - 1 if state.row else state.step)
    if later := decided(lambda: state.checkpoints.remove_after(state.step)):
        console.note(f"checkpoints after step {state.step} will be written again: {', '.join(later)} removed")


def _manifest(job: Job[RunConfig]) -> dict[str, Any]:
    return {
        "format": 1,
        "state": "running",
        "recipe": job.config.recipe,
        "recipe_sha256": job.config.recipe_sha256,
        "imports": imports_of(job.config),
        "method": job.method,
        "base_model": job.base_model,
        "base_model_sha256": None if job.model_path is None or not world().is_main else weights_of(job.model_path),
        "tokenizer": job.tokenizer.fingerprint,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": str(job.device),
        "ranks": world().size,
        "command": command_line(),
        "seed": job.config.seed,
        "config": to_dict(replace(job.config, output_dir=None)),
        "data": data_facts(job),
        "environment": collect(),
        "git": git_state(),
    }


def opening_facts(job: Job[RunConfig], model: nn.Module, run_path: Path, first: int) -> RunFacts:
    """What the console shows before the first step."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    return RunFacts(
        model=job.base_model,
        method=job.method,
        # a byte of the codes of a sharded NF4 weight is two of its values
        parameters=sum(parameter.numel() * (1 + (parameter.dtype == torch.uint8)) for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        data=job.data_lines,
        steps_total=job.steps_total,
        step_first=first,
        device=str(job.device) if world().size == 1 else f"{world().size} x {job.device.type}",
        dtype=job.config.model.dtype,
        precision=precision(job),
        run_dir=str(run_path),
        sample=job.train.rendered(0),
    )
