"""Loggers by name. metrics.jsonl and the console, which every run has, are not among them."""

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from tt_ckpt.redaction import redact, redact_data
from tt_train.config import RunConfig, logger_options, to_dict
from tt_train.devices.distributed import world
from tt_train.errors import TrainingError
from tt_train.records.run_files import own_folder, read_manifest
from tt_train.run.console import Console
from tt_train.run.dir import RunDir
from tt_train.settings.keys.logger_table import LOGGERS
from tt_train.settings.registry import resolve

Row = dict[str, Any]
Logger = Callable[[Row], None]  # takes a row of metrics.jsonl; its ``close``, if it has one, ends it


@contextmanager
def open_loggers(config: RunConfig, run: RunDir, step: int, console: Console | None = None) -> Iterator[list[Logger]]:
    """The loggers that the config names, closed at the end, whatever ends it; ``step``: what the run continues from.

    A logger is what ``factory(run, config, step, **options)`` gives: a function that takes a row of metrics.jsonl. What
    it holds of later steps belongs to a continuation that was given up. It must start, and its first row must succeed.
    If a later one fails, such as without network, the logger gets no more rows, a warning says so, and training
    continues. What a client prints when it starts and ends goes to stderr: stdout ends with the run directory.
    """
    console = console or Console()
    if not world().is_main:
        yield []
        return
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name, options in logger_options(config).items():
            with _named(name, "does not start"), redirect_stdout(sys.stderr):
                logger = resolve(name, LOGGERS)(run, redact_data(to_dict(config)), step, **options)
            if callable(close := getattr(logger, "close", None)):
                stack.callback(_or_warn, close, f"{name} could not be closed", console)
            loggers.append(_guarded(name, logger, console))
        yield loggers


def _guarded(name: str, logger: Logger, console: Console) -> Logger:
    """The same logger, to which no secret comes, and whose failures after its first row end no run."""
    state = "new"

    def log_row(row: Row) -> None:
        nonlocal state
        if state == "new":
            with _named(name, "takes no figures"):
                logger(redact_data(row))
            state = "works"
        elif state == "works" and not _or_warn(
            lambda: logger(redact_data(row)), f"{name} gets no figures from step {row['step']} on", console
        ):
            state = "failed"

    return log_row


@contextmanager
def _named(name: str, consequence: str) -> Iterator[None]:
    """A failure inside as an error that names the logger."""
    try:
        yield
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise TrainingError(f"loggers: {name} {consequence}: {what}; correct it, or leave it out") from error


def _or_warn(action: Callable[[], None], consequence: str, console: Console) -> bool:
    """Whether ``action`` succeeded. What a logger cannot do ends no run: metrics.jsonl has every figure."""
    try:
        with redirect_stdout(sys.stderr):
            action()
    except Exception as error:
        console.warn(f"loggers: {consequence}: {type(error).__name__}: {error}; metrics.jsonl has all figures")
        logging.getLogger("tt_train").warning("loggers: %s", consequence, exc_info=error)
        return False
    return True


def _figures(row: Row) -> dict[str, float]:
    """The numbers of a row, without its step."""
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _failed() -> bool:
    """Whether an error is on its way."""
    return sys.exc_info()[1] is not None


class TensorBoard:
    """Scalars under ``tb/``, for ``tensorboard --logdir RUN/tb``."""

    def __init__(self, run: RunDir, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = own_folder(run.path.resolve(), "tb")  # a thread writes, and another logger may change the folder
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if folder.is_dir() else None)
        self.writer.add_text("config.yaml", "".join(f"    {line}\n" for line in _yaml(config).splitlines()))

    def __call__(self, row: Row) -> None:
        for key, value in _figures(row).items():
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A Weights & Biases run named like the run directory. Its id is in manifest.json: a resumed run continues it."""

    def __init__(self, run: RunDir, config: dict[str, Any], step: int, **options: Any) -> None:
        with chdir(Path(__file__).parent):  # a wandb/settings of the working folder would choose who gets the key
            import wandb

            wandb.setup()

        own_folder(run.path, "wandb")
        home = run.path.resolve()  # W&B's service was started in another folder, so no relative path
        named = {"project": os.environ.get("WANDB_PROJECT", "tt"), "name": redact(home.name)}
        self.run = wandb.init(
            dir=str(home), config=config, id=_id_of(run, "wandb", 8), resume="allow",
            settings=wandb.Settings(disable_git=True, save_code=False),  # git runs what a repository's config names
            **named | options,
        )  # fmt: skip
        self.run.save(str(home / "config.yaml"), base_path=str(home), policy="now")

    def __call__(self, row: Row) -> None:
        self.run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish(exit_code=1 if _failed() else 0)


class Trackio:
    """A run of Trackio named like the run directory; ``trackio show`` draws it. A resumed run continues it."""

    def __init__(self, run: RunDir, config: dict[str, Any], step: int, **options: Any) -> None:
        import trackio

        self.finish = trackio.finish  # also known to trackio, which would finish the run again when Python ends
        named = {"project": os.environ.get("TRACKIO_PROJECT", "tt"), "name": redact(run.path.resolve().name)}
        self.run = trackio.init(config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
                                **named | options)  # fmt: skip

    def __call__(self, row: Row) -> None:
        self.run.log(_figures(row), step=row["step"])

    def close(self) -> None:
        self.finish()


class MLflow:
    """A run of an MLflow experiment, FINISHED or FAILED at the end. A resumed run continues it.

    It uses a client of its own, so that code that calls ``mlflow`` in a recipe keeps its own active run.
    """

    def __init__(
        self, run: RunDir, config: dict[str, Any], step: int, *, tracking_uri: str | None = None,
        experiment: str | None = None, run_name: str | None = None,
    ) -> None:  # fmt: skip
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri)
        experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "tt")
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        known = read_manifest(run.path).get("mlflow_id")
        if known is None:
            name = run_name or redact(run.path.resolve().name)
            known = self.client.create_run(number, run_name=name).info.run_id
            run.update_manifest(mlflow_id=known)
        else:
            self.client.update_run(known, status="RUNNING")
        self.id = str(known)
        self.client.log_text(self.id, _yaml(config), "config.yaml")

    def __call__(self, row: Row) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        figures = _figures(row)
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, row["step"]) for key, value in figures.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id, status="FAILED" if _failed() else "FINISHED")


class Comet:
    """A Comet experiment named like the run directory. A resumed run continues it.

    Comet would upload code, git patches, arguments and the console on its own; all of that is off.
    """

    def __init__(
        self, run: RunDir, config: dict[str, Any], step: int, *, project: str | None = None,
        workspace: str | None = None, name: str | None = None, tags: list[str] | None = None, mode: str = "online",
    ) -> None:  # fmt: skip
        home, key = run.path.resolve(), _id_of(run, "comet", 32)
        folder = own_folder(home, "comet")
        with chdir(Path(__file__).parent):  # a .comet.config of the working folder would choose who gets the key
            import comet_ml

            off = ("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details",
                   "auto_param_logging", "auto_metric_logging", "auto_log_co2")  # fmt: skip
            settings = comet_ml.ExperimentConfig(
                **dict.fromkeys(off, False), auto_output_logging=False, offline_directory=str(folder),
                name=name or redact(home.name), tags=tags,
            )  # fmt: skip
            self.experiment = comet_ml.start(
                project_name=project or os.environ.get("COMET_PROJECT_NAME", "tt"), workspace=workspace,
                experiment_key=key, mode="get_or_create", online=mode == "online",
                experiment_config=settings,
            )  # fmt: skip
        self.experiment.log_parameters(config)
        self.experiment.log_asset(str(home / "config.yaml"), file_name="config.yaml")

    def __call__(self, row: Row) -> None:
        self.experiment.log_metrics(_figures(row), step=row["step"])

    def close(self) -> None:
        if _failed():
            self.experiment.add_tag("failed")
        self.experiment.end()


def _id_of(run: RunDir, logger: str, length: int) -> str:
    """The id under which a logger knows the run; manifest.json keeps it for a resumed run."""
    known = read_manifest(run.path).get(f"{logger}_id")
    if known is None:
        known = uuid.uuid4().hex[:length]
        run.update_manifest(**{f"{logger}_id": known})
    return str(known)
