"""The training state of a run, out and back in: weights, optimizer, place in the data, and what it belonged to."""

import contextlib
import json
import shutil
from collections.abc import Callable
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
    "save_async",
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


class TrainingState:
    """What a run saves and restores: its trained weights and its optimizer. An adapter run leaves its base."""

    def __init__(self, run: RunDir, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.job, self.model, self.optimizer = job, model, optimizer
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.checkpoints = tt_ckpt.TrainCheckpoint(run.checkpoints, keep_last=job.config.keep_last)
        self.failed = 0  # saves in a row

    def check_space(self) -> None:
        """ConfigError where the checkpoints that are to come cannot fit on the disk."""
        size = 3 * sum(parameter.nbytes for parameter in self.names)  # weights and two moments
        needed = int(1.2 * size * (self.job.config.keep_last + 1))
        free = shutil.disk_usage(self.checkpoints.directory.parent).free
        if free < needed:
            raise ConfigError(
                [
                    f"output_dir: {free / 2**30:.1f} GiB free on its disk, checkpoints need {needed / 2**30:.1f} "
                    "GiB; choose another -o, or lower keep_last"
                ]
            )

    def save(self, step: int, progress: dict[str, Any]) -> Path:
        """Write a checkpoint after ``step`` steps; raises CheckpointNotSaved."""
        with contextlib.suppress(tt_ckpt.CheckpointNotSaved):
            self.checkpoints.wait()  # one that failed in the background is made up for by this one
        return self.checkpoints.save(step, **self._content(step, progress))

    def _content(self, step: int, progress: dict[str, Any]) -> dict[str, Any]:
        adapted = self.job.lora is not None
        weights = tt_peft.adapter_state_dict(self.model) if adapted else self._weights()
        tensors = {
            "adapter" if adapted else "model": weights,
            "optimizer": optimizer_tensors(self.optimizer, self.names),
        }
        state = {"step": step, "data": self.job.train.fingerprint, "progress": progress}
        return {"tensors": tensors, "state": state}

    def try_to_save(self, step: int, progress: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Save, with ``save_async`` in the background; a failure is a warning, see ``tolerate``."""
        content = self._content(step, progress)
        if self.job.config.save_async:
            self.tolerate(self.checkpoints.wait, warn)
            self.checkpoints.save_async(step, **content)
        else:
            self.tolerate(lambda: self.checkpoints.save(step, **content), warn)

    def check(self, warn: Callable[[str], None]) -> None:
        """At every step: whether a save in the background has failed."""
        self.tolerate(self.checkpoints.check, warn)

    def drain(self, warn: Callable[[str], None]) -> None:
        """At the end: wait for the save in the background."""
        self.tolerate(self.checkpoints.wait, warn)

    def tolerate(self, save: Callable[[], Path | None], warn: Callable[[str], None]) -> None:
        """A failed save is a warning as long as an older checkpoint exists and the last save went well."""
        try:
            if save() is not None:
                self.failed = 0
        except tt_ckpt.CheckpointNotSaved as error:
            self.failed += 1
            if self.failed > 1 or self.checkpoints.latest(hashes=False) is None:
                raise
            warn(f"{error}; training goes on, the checkpoint before it is whole")

    def restore(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Put a checkpoint into the model and the optimizer; returns (steps made, progress)."""
        saved = self.checkpoints.restore(path)
        if saved.state["data"] != self.job.train.fingerprint:
            raise ConfigError(
                [
                    f"--resume: the rows of data.train are not those that {path} was trained on; restore them, or "
                    "start a new run"
                ]
            )
        if self.job.lora is not None:
            tt_peft.load_adapter_state_(self.model, saved.tensors["adapter"])
        else:
            with torch.no_grad():
                for name, weight in self._weights().items():
                    weight.copy_(saved.tensors["model"][name])
        load_optimizer_tensors_(self.optimizer, saved.tensors["optimizer"], self.names)
        return int(saved.state["step"]), dict(saved.state["progress"])

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for parameter, name in self.names.items()}
