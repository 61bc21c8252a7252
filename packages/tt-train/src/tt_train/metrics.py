"""Where the figures of a run go: metrics.jsonl always, other loggers by name."""

import importlib.util
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tt_train.errors import ConfigError
from tt_train.registry import LOGGERS, resolve

Logger = Callable[[dict[str, Any]], None]  # takes a row of metrics.jsonl


def open_loggers(names: Sequence[str], run_path: Path, config: dict[str, Any]) -> list[Logger]:
    """The named loggers; ConfigError where one's package is not installed."""
    return [resolve(name, LOGGERS)(run_path, config) for name in names]


def tensorboard(run_path: Path, config: dict[str, Any]) -> Logger:
    """Scalars under ``tb/``, for ``tensorboard --logdir RUN/tb``."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(["loggers: tensorboard is not installed; pip install tensorboard, or leave it out"])
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(run_path / "tb"))

    def log(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return log


def wandb(run_path: Path, config: dict[str, Any]) -> Logger:
    """A Weights & Biases run named like the run directory."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(["loggers: wandb is not installed; pip install wandb, or leave it out"])
    import wandb as client

    run = client.init(project="tt", name=run_path.name, dir=str(run_path), config=config, resume="allow")

    def log(row: dict[str, Any]) -> None:
        run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    return log


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that was in use so far, in GiB: on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
