"""The training state of a run, out and back in: weights, optimizer, place in the data, and what it belonged to."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tt_ckpt
import tt_peft
from tt_train.config import SFTConfig, to_dict
from tt_train.errors import ConfigError
from tt_train.optim import load_optimizer_tensors_, optimizer_tensors
from tt_train.recipes._assemble import Job
from tt_train.run_dir import RunDir, is_run, list_runs, read_json

# keys that may differ when a run goes on: they change how long, how often and where, but not which steps are made
_MAY_CHANGE = {
    "output_dir",
    "save_every",
    "eval_every",
    "keep_last",
    "loggers",
    "data.num_workers",
    "samples.num",
    "samples.max_new_tokens",
    "epochs",
    "max_steps",
    "on_nonfinite",
}


def find_resumable(config: SFTConfig, resume: str | Path | None) -> Path | None:
    """The run to go on with; None to start anew.

    ``auto``: the run at ``output_dir``, else the newest one under runs/ with the same config that is not finished.
    """
    if resume is None:
        return None
    if str(resume) != "auto":
        path = Path(resume)
        path = path.parent.parent if path.name.startswith("step-") else path
        if not is_run(path):
            raise ConfigError(
                [f"--resume: {resume} is no run with training state; to start from a model's weights, set model.path"]
            )
        return path
    if config.output_dir is not None:
        path = Path(config.output_dir)
        return path if is_run(path) else None
    unfinished = (Path(run["path"]) for run in list_runs() if run["state"] != "finished")
    return next((path for path in unfinished if not changed_keys(saved_config(path), config)), None)


def saved_config(run: Path) -> dict[str, Any]:
    """The config that a run was started with, as plain data."""
    found: dict[str, Any] = read_json(run / "manifest.json").get("config") or {}
    return found


def changed_keys(before: dict[str, Any], config: SFTConfig) -> list[str]:
    """``key: old -> new`` for each key that would make other steps than the saved run's."""
    old, new = _flat(before), _flat(to_dict(config))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _MAY_CHANGE
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner and not prefix.startswith("data."):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


def trained_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter that trains, and its name."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_training_state(
    run: RunDir, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, progress: dict[str, Any]
) -> Path:
    """Write a checkpoint after ``step`` steps. An adapter run saves its adapter; the base is on disk already."""
    names = trained_names(model)
    weights = (
        tt_peft.adapter_state_dict(model) if job.lora is not None else {name: p.detach() for p, name in names.items()}
    )
    tensors = {
        "adapter" if job.lora is not None else "model": weights,
        "optimizer": optimizer_tensors(optimizer, names),
    }
    state = {"step": step, "data": job.train.fingerprint, "progress": progress}
    return tt_ckpt.TrainCheckpoint(run.checkpoints, keep_last=job.config.keep_last).save(
        step, tensors=tensors, state=state
    )


def restore_training_state(
    path: Path, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint into ``model`` and ``optimizer``; returns (steps made, progress)."""
    saved = tt_ckpt.TrainCheckpoint(path.parent, keep_last=job.config.keep_last).restore(path)
    if saved.state["data"] != job.train.fingerprint:
        raise ConfigError(
            [
                f"--resume: the rows of data.train are not those that {path.parent.parent} trained on; restore "
                "them, or start a new run"
            ]
        )
    names = trained_names(model)
    if job.lora is not None:
        tt_peft.load_adapter_state_(model, saved.tensors["adapter"])
    else:
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(saved.tensors["model"][name])
    load_optimizer_tensors_(optimizer, saved.tensors["optimizer"], names)
    return int(saved.state["step"]), dict(saved.state["progress"])
