"""Loggers by name. metrics.jsonl and the console, which every run has, are not among them."""

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any

from tt_ckpt.redaction import redact, redact_data
from tt_train.config import RunConfig, to_dict
from tt_train.registry import LOGGERS, resolve
from tt_train.run.dir import RunDir
from tt_train.run_files import own_folder, read_manifest

Logger = Callable[[dict[str, Any]], None]  # takes a row of metrics.jsonl; its ``close``, if it has one, ends it


@contextmanager
def open_loggers(config: RunConfig, run: RunDir, step: int) -> Iterator[list[Logger]]:
    """The loggers that the config names, closed at the end, whatever ends it; ``step``: what the run continues from.

    A logger is what ``factory(run, config, step)`` gives: a function that takes a row of metrics.jsonl. What it
    holds of later steps belongs to a continuation that was given up.
    """
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name in config.loggers:
            logger = resolve(name, LOGGERS)(run, redact_data(to_dict(config)), step)
            if callable(close := getattr(logger, "close", None)):
                stack.callback(close)
            loggers.append(_blanking(logger))
        yield loggers


def _blanking(logger: Logger) -> Logger:
    """The same logger, to which no secret comes."""
    return lambda row: logger(redact_data(row))


class TensorBoard:
    """Scalars under ``tb/``, for ``tensorboard --logdir RUN/tb``."""

    def __init__(self, run: RunDir, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = own_folder(run.path, "tb")
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if folder.is_dir() else None)

    def __call__(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A Weights & Biases run named like the run directory. Its id is in manifest.json: a resumed run continues it."""

    def __init__(self, run: RunDir, config: dict[str, Any], step: int) -> None:
        with chdir(Path(__file__).parent):  # a wandb/settings of the working folder would choose who gets the key
            import wandb

            wandb.setup()

        own_folder(run.path, "wandb")
        home = run.path.resolve()  # W&B's service was started in another folder, so no relative path
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tt"), name=redact(home.name), dir=str(home),
            config=config, id=_wandb_id(run), resume="allow",
            settings=wandb.Settings(disable_git=True, save_code=False),  # git runs what a repository's config names
        )  # fmt: skip

    def __call__(self, row: dict[str, Any]) -> None:
        self.run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        """Failed, if an error is on its way."""
        self.run.finish(exit_code=0 if sys.exc_info()[1] is None else 1)


def _wandb_id(run: RunDir) -> str:
    known = read_manifest(run.path).get("wandb_id")
    if known is None:
        known = uuid.uuid4().hex[:8]
        run.update_manifest(wandb_id=known)
    return str(known)
