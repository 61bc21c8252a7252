"""What stands around the loop of every recipe: opening a run directory, and leaving results in it."""

import os
import shlex
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

import tt_ckpt
import tt_models
import tt_peft
from tt_train.config import SFTConfig, to_dict, to_yaml
from tt_train.console import RunFacts
from tt_train.environment import collect, command_line, git_state
from tt_train.errors import ConfigError
from tt_train.headline import part_name, tokens_per_second, training_loss
from tt_train.model_card import model_card
from tt_train.recipes._assemble import Job
from tt_train.recipes._rows import count_rows
from tt_train.report import write_report
from tt_train.resume import changed_keys, find_resumable, saved_config
from tt_train.run_dir import RunDir, new_path, probe_writable, read_json
from tt_train.serving import TEMPLATE_FILE, own_template, serving_files, tokenizer_files


def begin(job: Job, resume: str | Path | None) -> tuple[RunDir, Path | None]:
    """Open a new run directory, or the one to go on with; also gives the checkpoint to restore, None to start anew."""
    config = job.config
    going_on = find_resumable(config, resume)
    if going_on is None:
        path = new_path(config.output_dir, job.base_model, job.method)
        probe_writable(path)
        run = RunDir(path)
        run.write_text("config.yaml", to_yaml(replace(config, output_dir=None)))
        run.write_json("manifest.json", _manifest(job))
        run.set_state("running")
        template = own_template(job.tokenizer, config.data.template)
        if template is not None:
            run.write_text(TEMPLATE_FILE, template)
        return run, None
    if changed := changed_keys(saved_config(going_on), config):
        raise ConfigError(
            [f"--resume: {line}; a resumed run keeps this key: set it back, or start a new run" for line in changed]
        )
    run = RunDir(going_on)
    run.update_manifest(config=to_dict(replace(config, output_dir=None)))
    run.set_state("running")
    if resume is not None and Path(resume).name.startswith("step-"):
        return run, Path(resume)
    return run, tt_ckpt.TrainCheckpoint(run.checkpoints, keep_last=config.keep_last).latest()


def _manifest(job: Job) -> dict[str, Any]:
    return {
        "format": 1,
        "state": "running",
        "recipe": job.config.recipe,
        "method": job.method,
        "base_model": job.base_model,
        "tokenizer": job.tokenizer.fingerprint,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": str(job.device),
        "command": command_line(),
        "seed": job.config.seed,
        "config": to_dict(replace(job.config, output_dir=None)),
        "data": _data(job),
        "environment": collect(),
        "git": git_state(),
    }


def _data(job: Job) -> dict[str, Any]:
    return {
        "fingerprint": job.train.fingerprint,
        "rows": count_rows(job.train),
        "report": job.train.report,
        "held_out_rows": count_rows(job.held_out) if job.held_out else 0,
    }


def opening_facts(job: Job, model: nn.Module, run_path: Path, first: int) -> RunFacts:
    """What the console shows before the first step."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    return RunFacts(
        model=job.base_model,
        method=job.method,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        data=job.data_lines,
        steps_total=job.steps_total,
        step_first=first,
        device=str(job.device),
        dtype=job.config.model.dtype,
        run_dir=str(run_path),
        sample=job.train.rendered(0),
    )


def finish(run: RunDir, job: Job, model: nn.Module) -> dict[str, Any]:
    """Write the results, the card and the report; returns the summary that the console shows."""
    if job.lora is not None:
        tt_peft.save_adapter(model, run.path / "adapter", base_model=job.base_model)
    else:
        config = job.hf_config if job.model_path else tt_models.config_to_hf(job.model_config)
        source = job.model_path or Path(str(job.config.model.tokenizer))
        files = tokenizer_files(Path(job.config.model.tokenizer)) if job.config.model.tokenizer else {}
        files |= serving_files(job.tokenizer, job.config.data.template, source)
        tt_ckpt.save_hf(model, run.path / "model", config=config, source=source, files=files)
    rows = run.rows("metrics.jsonl")
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    summary: dict[str, Any] = {
        "run_dir": str(run.path),
        "steps": rows[-1]["step"],
        "loss_first": losses[0] if losses else None,
        "loss_last": training_loss(rows),
        "loss_over": part_name(rows),
        "eval_loss": next((row["eval_loss"] for row in reversed(rows) if row.get("eval_loss") is not None), None),
        "seconds": rows[-1]["elapsed_s"],
        "tokens": rows[-1]["tokens"],
        "tokens_per_s": tokens_per_second(rows),
    }
    run.finished(summary=summary, data=_data(job))  # a stream's report is known only now
    run.write_text("README.md", model_card(job, read_json(run.path / "manifest.json"), summary))
    write_report([run.path])
    return {**summary, "next": next_commands(run.path, job.method)}


def next_commands(run: Path, method: str) -> list[str]:
    """What a user would type next."""
    path = shlex.quote(os.path.relpath(run) if not run.is_absolute() else str(run))
    merged = shlex.quote(f"{path}-merged") if method != "full" else None
    return [f"tt chat {path}", *([f"tt merge {path} -o {merged}"] if merged else []), f"tt report {path}"]


def with_absolute_paths(config: SFTConfig) -> SFTConfig:
    """The config with every local path absolute, so that the run directory works from any folder."""
    model = replace(config.model, path=_absolute(config.model.path), tokenizer=_absolute(config.model.tokenizer))
    adapter = config.adapter and replace(config.adapter, path=_absolute(config.adapter.path))
    rows = {key: _absolute(getattr(config.data, key)) for key in ("train", "eval", "template", "cache_dir")}
    data = replace(config.data, **rows)
    return replace(config, model=model, adapter=adapter, data=data)


def _absolute(source: Any) -> Any:
    if isinstance(source, str) and source and Path(source).exists():
        return str(Path(source).resolve())
    if isinstance(source, list):
        return [_absolute(item) for item in source]
    if isinstance(source, dict):
        return {_absolute(key): weight for key, weight in source.items()}
    return source
