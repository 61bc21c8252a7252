"""Where a run goes: a new directory, or the run and checkpoint that ``--resume`` means, if they fit the config."""

import json
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tt_ckpt
from tt_ckpt import files
from tt_ckpt.redaction import redact_data
from tt_ckpt.shown import listed, plain
from tt_train.config import RunConfig, to_dict
from tt_train.errors import ConfigError, counted, did_you_mean
from tt_train.job import Job
from tt_train.records.run_files import MARKER, FinishedRun, is_run, read_manifest
from tt_train.run.listing import run_paths, state_of
from tt_train.run.saved import check_state
from tt_train.settings.registry import imports_of

log = logging.getLogger("tt_train")

# keys that may differ when a run is resumed: they change how long, how often and where, but not which steps are made
_MAY_CHANGE = {
    "output_dir",
    "save_every",
    "save_async",
    "save_last",
    "eval_every",
    "early_stop_after",
    "keep_last",
    "loggers",
    "log_every",
    "profile",
    "data.num_workers",
    "data.worker_timeout_s",
    "samples.num",
    "samples.max_new_tokens",
    "samples.exact_match",
    "epochs",
    "max_steps",
    "on_nonfinite",
    "process_group_timeout_s",
    "parallel.shard",
    "parallel.replicate",
    "parallel.cpu_offload",
    "parallel.reduce_every_micro_batch",
    "activation_checkpointing",
    "activation_offloading",
    "optimizer_in_backward",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run to resume; ``checkpoint`` if the user named one. Not ``in_place``: a new run begins from there."""

    run: Path
    checkpoint: Path | None = None
    in_place: bool = True


def find_origin(config: RunConfig, resume: str | Path | None) -> Origin | None:
    """What to resume; None to start anew.

    ``auto``: the run at ``output_dir``, else the newest one under runs/ with the same config that is not finished.
    A path names a run or one of its checkpoints; with another ``output_dir``, a new run begins from there.
    """
    if resume is None:
        return None
    if str(resume) != "auto":
        return _named(Path(resume), config.output_dir)
    if config.output_dir is not None:
        path = Path(config.output_dir)
        return Origin(run=path) if is_run(path) else None
    unfinished = (path for path in run_paths() if _is_unfinished(path))
    return next((Origin(run=path) for path in unfinished if not changed_keys(FinishedRun(path).config, config)), None)


def _is_unfinished(path: Path) -> bool:
    try:
        return state_of(path, read_manifest(path)) != "finished"
    except (OSError, ValueError) as error:  # a damaged run, which is not resumed unasked
        log.warning("%s", error)
        return False


def check_destination(config: RunConfig, resume: str | Path | None) -> None:
    """ConfigError, before rows are read, if there is nothing to resume or the new run's directory is not free."""
    origin = find_origin(config, resume)
    if config.output_dir is not None and (origin is None or not origin.in_place):
        new_path(config.output_dir, "", "")


def _named(path: Path, output_dir: str | None) -> Origin:
    checkpoint = path if path.name.startswith("step-") else None
    run = path if checkpoint is None else (path if len(path.parts) > 2 else path.absolute()).parent.parent
    if not is_run(run):
        near = did_you_mean(str(path), [*map(str, run_paths()), "auto"])
        cure = near or "; to start from a model's weights, set model.path"
        raise ConfigError([f"--resume: {path} is not a run with training state{cure}"])
    if checkpoint is not None and not checkpoint.is_dir():
        there = sorted(entry.name for entry in checkpoint.parent.glob("step-*"))
        known = f"; there are {', '.join(there)}" if there else "; the run has no checkpoint"
        raise ConfigError([f"--resume: {path} does not exist{did_you_mean(path.name, there)}{known}"])
    in_place = output_dir is None or Path(output_dir).resolve() == run.resolve()
    return Origin(run=run, checkpoint=checkpoint, in_place=in_place)


def changed_keys(before: dict[str, Any], config: RunConfig) -> list[str]:
    """``key: old -> new`` for each key that would make other steps than the saved run's."""
    defaults = flat(to_dict(type(config)()))  # a key that did not exist yet had its default's effect
    old, new = defaults | flat(before), flat(redact_data(to_dict(config)))  # before was blanked when it was saved
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not {key, key.partition(".")[0]} & _MAY_CHANGE
    ]


def changed_imports(manifest: dict[str, Any], config: RunConfig) -> list[str]:
    """A line for each module of a loss, optimizer or logger whose file is not that of the run any more."""
    before = manifest.get("imports") or {}
    return [
        f"{module}: its file has sha256 {str(now)[:12]}, the run began with {str(before[module])[:12]}"
        for module, now in imports_of(config).items()
        if before.get(module) not in (None, now)
    ]


def flat(value: dict[str, Any]) -> dict[str, Any]:
    """The keys of sections, as ``section.key``; a mapping in a section is one value, as it replaces another whole."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= {f"{key}.{name}": each for name, each in inner.items()}
        else:
            found[key] = inner
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def nothing_left(job: Job[RunConfig], run: Path) -> str | None:
    """Why a finished run has no step left to make; None if it has one, or its result is not there."""
    finished = FinishedRun(run)
    summary = finished.manifest.get("summary") or {}
    if finished.manifest.get("state") != "finished" or not any((run / name).is_dir() for name in ("adapter", "model")):
        return None
    steps, total = summary.get("steps", 0), job.steps_total
    made = counted(steps, "step")
    if steps >= total:
        return f"{run} is finished after {made}, nothing is left to do; raise max_steps or epochs to continue"
    if summary.get("stopped_early") and finished.config.get("early_stop_after") == job.config.early_stop_after:
        return f"{run} has stopped early after {made}, nothing is left to do; raise early_stop_after to continue"
    return None


def read_checkpoint(job: Job[RunConfig], origin: Origin, *, explicit: bool) -> tt_ckpt.TrainState | None:
    """The named or newest checkpoint, whole and of this config's rows; None if the run has none to continue from.

    ``explicit``: the user named the run, so that starting anew is not an answer.
    """
    checkpoints = tt_ckpt.TrainCheckpoint(
        FinishedRun(origin.run).checkpoints, timeout_s=job.config.process_group_timeout_s
    )
    path = origin.checkpoint or checkpoints.latest()
    if path is None:
        _refuse_damaged(origin.run, explicit=explicit)
        return None
    try:
        saved = checkpoints.restore(path)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError([f"--resume: {error}; choose another checkpoint"]) from error
    check_state(path, saved.step, saved.state)
    if saved.state["data"] != job.train.fingerprint:
        rows = f"the rows of data.train are not those that {path} was trained on"
        raise ConfigError([f"--resume: {rows}; restore them, or start a new run"])
    if saved.step > job.steps_total:
        raise ConfigError(
            [f"--resume: {path} is after the last step ({job.steps_total}) of this config; raise max_steps or epochs"]
        )
    return saved


def _refuse_damaged(run: Path, *, explicit: bool) -> None:
    """A run whose checkpoints cannot be used, or that has a result and no checkpoint, does not quietly start anew."""
    result = next((run / name for name in ("adapter", "model") if (run / name).is_dir()), None)
    how = f"adapter.path={result}" if result is not None and result.name == "adapter" else f"model.path={run}"
    there = sorted(entry.name for entry in (run / "checkpoints").glob("*step-*") if not entry.name.startswith(".tmp-"))
    if there:
        cure = "restore one from a copy, or start a new run with another -o"
        if result is not None:
            cure += f"; its result is in {result}: a new run starts from it with {how}"
        raise ConfigError([f"--resume: every checkpoint of {run} is damaged ({', '.join(there)}); {cure}"])
    if FinishedRun(run).manifest.get("state") == "finished":
        raise ConfigError(
            [f"--resume: {run} is finished and kept no checkpoint; start a new run from its result: {how}"]
        )
    if explicit:
        raise ConfigError([f"--resume: {run} has no checkpoint to continue from; start a new run with another -o"])


def default_name(model: str, method: str) -> str:
    """``<time>-<model>-<method>``, safe as a folder's name."""
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", Path(model).name).strip("-.") or "model"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}-{method}"


def new_path(output_dir: str | None, model: str, method: str, *, root: Path | None = None) -> Path:
    """Where a new run goes; an ``output_dir`` that already holds something, or cannot be a path, is refused."""
    if output_dir is None:
        base = (root or Path("runs")) / default_name(model, method)
        path, number = base, 2
        while path.exists():  # two runs within a second
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
        return path
    path = Path(output_dir)
    if not str(path).isprintable():
        raise ConfigError([f"output_dir: {plain(path)} contains an unprintable character; choose another -o"])
    try:
        there = sorted(entry.name for entry in path.iterdir()) if os.path.lexists(path) else []
    except NotADirectoryError:
        raise ConfigError([f"output_dir: {path} is not a directory; choose another -o"]) from None
    except OSError as error:
        raise ConfigError([f"output_dir: {path} cannot be used ({error.strerror}); choose another -o"]) from None
    if there:
        cure = "continue with --resume auto, or choose another -o" if MARKER in there else "choose another -o"
        raise ConfigError([f"output_dir: {path} is not empty (it contains {listed(there, 4)}); {cure}"])
    return path


def probe_writable(path: Path) -> None:
    """Find out now, not at the first checkpoint, that ``path`` cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{files.TMP_PREFIX}{secrets.token_hex(8)}"
        with files.create(probe) as file:
            file.write(b"tt")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            [f"output_dir: {path} cannot be written ({error.strerror or error}); choose another -o"]
        ) from error
