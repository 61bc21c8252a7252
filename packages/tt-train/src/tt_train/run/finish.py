"""What comes after the loop of every recipe: the result, and then figures, card and report."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_train.config import RunConfig, named_sets
from tt_train.devices.distributed import world
from tt_train.devices.launch import everywhere
from tt_train.devices.sharding import is_sharded
from tt_train.errors import counted, shell_word
from tt_train.inputs.rows import count_rows
from tt_train.job import Job
from tt_train.memory import DTYPES
from tt_train.records.figures import Figures
from tt_train.records.run_files import TEMPLATE_FILE, read_manifest
from tt_train.records.series import set_of
from tt_train.report import write_report
from tt_train.report.figure import NO_PICTURE
from tt_train.report.summary import part_name, tokens_per_second, training_loss
from tt_train.run.checkpoints import TrainingState
from tt_train.run.console import Console
from tt_train.run.dir import RunDir
from tt_train.run.loop import Metrics
from tt_train.run.model_card import model_card
from tt_train.run.serving import own_template, serving_files, serving_of, to_record
from tt_train.settings.recipe_file import repeating

_BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_SHORT = {dtype: name for name, dtype in DTYPES.items()}


def finish(metrics: Metrics) -> None:
    """Write the result first, and then what may fail after it: the last figures, the card and the report."""
    job, run, state, console = metrics.job, metrics.run, metrics.state, metrics.console
    if state.step < job.steps_total:
        without = counted(state.evaluations_since_best, "evaluation")
        lowest = state.best["eval_loss"] if state.best else float("nan")
        console.note(
            f"stopped early after step {state.step}: {without} without a lower held-out loss than {lowest:.4f}"
        )
    state.drain(console.warn)
    if job.config.save_last:
        state.tolerate(state.save, console.warn)
    everywhere(lambda: write_result(job, run, state))
    if state.row is not None:
        metrics.record(sample=False)
        _or_warn(console, "the last samples", metrics.sample)
    if not world().is_main:
        return
    summary = _summary(job, run, state)
    run.finished(
        summary=summary, data=data_facts(job), best=_best(run, state), token_stream=state.token_stream
    )  # a stream's report is known only now
    if job.lora is not None:
        _or_warn(console, "what a merge needs of the tokenizer", lambda: _record_serving(job, run))
    _or_warn(console, "README.md", lambda: _write_card(job, run, summary))
    _or_warn(console, "the report", lambda: _write_report(run, state, console))
    console.end({**summary, "next": next_commands(run.path, job.method)})
    if best := _best(run, state):
        _tell_best(console, run, best, steps=state.step)


def data_facts(job: Job[RunConfig]) -> dict[str, Any]:
    """What the manifest says of the rows."""
    return {
        "fingerprint": job.train.fingerprint,
        "rows": count_rows(job.train),
        "report": job.train.report,
        "held_out_rows": count_rows(job.held_out) if job.held_out else 0,
        **_lengths(job.train),
    } | (
        {"held_out_sets": {name: count_rows(rows) for name, rows in job.held_out.parts.items()}}
        if isinstance(job.held_out, tt_data.JoinedDataset)
        else {}
    )


def _lengths(rows: tt_data.Dataset | tt_data.Stream) -> dict[str, Any]:
    """Tokens per row (per pack, if rows are packed) and the share that is trained, of 2,000 rows; none of a stream."""
    if isinstance(rows, tt_data.Stream):
        return {}
    figures = tt_data.stats(rows, sample=2_000)
    lengths = figures["lengths"]
    return {
        "lengths": {"p50": lengths["p50"], "p90": lengths["p90"], "max": lengths["max"]},
        "share_trained": figures["share_trained"],
    }


def _or_warn(console: Console, what: str, action: Callable[[], object]) -> None:
    """The result is safe: what fails now is a warning."""
    try:
        action()
    except Exception as error:
        console.warn(f"{what} could not be written: {type(error).__name__}: {error}; the result is safe")
        logging.getLogger("tt_train").warning("%s could not be written", what, exc_info=error)


def write_result(job: Job[RunConfig], run: RunDir, state: TrainingState) -> None:
    """``adapter/`` or ``model/``, as a whole: what was there before is replaced by a rename.

    Rank 0 writes. The others take part if the model is sharded, since its tensors are gathered one by one.
    """
    main = world().is_main
    if not main and not is_sharded(state.model):
        return
    name = "model" if job.lora is None else "adapter"
    place = run.replacing(name) if main else nullcontext(run.path / name)
    if job.lora is not None:
        with place as part:
            tt_peft.save_adapter(state.model, part, base_model=job.base_model)
            if main and (template := own_template(job.tokenizer, job.config.data.template)) is not None:
                (part / TEMPLATE_FILE).write_text(template, encoding="utf-8")  # so that it goes where the adapter goes
        return
    config = job.hf_config if job.model_path else tt_models.config_to_hf(job.model_config)
    places = [Path(place) for place in (job.config.model.tokenizer, job.model_path) if place is not None]
    files = serving_files(places, job.tokenizer, job.config.data.template, job.model_path)
    dtypes = written_dtypes(job)
    narrow = dtypes == {torch.bfloat16}
    with place as part, state.optimizer.whole([] if narrow else state.names):
        stored = tt_ckpt.tensor_dtypes(job.model_path) if job.model_path else job.dtype
        tt_ckpt.save_hf(state.model, part, config=config, source=job.model_path, files=files, dtype=stored)


def _record_serving(job: Job[RunConfig], run: RunDir) -> None:
    """What ``tt merge`` needs of the tokenizer, with a digest of its files, in the order of ``find_origin``."""
    named = [Path(place) for place in (job.config.model.tokenizer, job.model_path) if place is not None]
    places = [run.path, run.path / "adapter", *(place for place in named if place.exists())]
    serving = serving_of(places, job.tokenizer, job.config.data.template, job.model_path)
    run.update_manifest(serving=to_record(serving, places))


def written_dtypes(job: Job[RunConfig]) -> set[torch.dtype]:
    """Of the floating tensors of a full result: what the base's files have; ``model.dtype`` if there is no base."""
    stored = tt_ckpt.tensor_dtypes(job.model_path).values() if job.model_path else [job.dtype]
    return {dtype for dtype in stored if dtype.is_floating_point}


def result_bytes(job: Job[RunConfig], state: TrainingState) -> int:
    """The size of the result on the disk."""
    if job.lora is not None:
        return sum(parameter.nbytes for parameter in state.names)
    weights = max(dtype.itemsize for dtype in written_dtypes(job)) * sum(one.numel() for one in state.names)
    beside = job.model_path.iterdir() if job.model_path else ()  # tokenizer and templates
    return weights + sum(file.stat().st_size for file in beside if file.is_file() and file.suffix in _BESIDE)


def precision(job: Job[RunConfig]) -> dict[str, str]:
    """In which dtype the forward pass runs, the trained weights are kept, and the result is written.

    ``merged``: of an adapter, what ``tt merge`` will write, if that is less than what the forward pass runs in.
    """
    whole = " and ".join(sorted(_SHORT.get(kind, str(kind).removeprefix("torch.")) for kind in written_dtypes(job)))
    facts = {"forward": job.config.model.dtype, "trained": "fp32", "written": whole}
    if job.config.adapter is None:
        return facts
    narrower = any(kind.itemsize < job.dtype.itemsize for kind in written_dtypes(job))
    return {**facts, "written": job.config.adapter.dtype} | ({"merged": whole} if narrower else {})


def _summary(job: Job[RunConfig], run: RunDir, state: TrainingState) -> dict[str, Any]:
    rows, evaluated = Figures(), list[dict[str, Any]]()
    for row in run.rows("metrics.jsonl"):
        rows.append({key: row.get(key) for key in ("step", "epoch", "loss", "tokens", "tokens_per_s")})
        evaluated = [*evaluated[:1], row] if row.get("eval_loss") is not None else evaluated
    losses = [loss for loss in rows.column("loss") if loss is not None]
    return {
        "run_dir": str(run.path),
        "steps": state.step,
        "loss_first": losses[0] if losses else None,
        "loss_last": training_loss(rows),
        "loss_over": part_name(rows),
        "eval_loss_first": evaluated[0]["eval_loss"] if evaluated else None,
        "eval_loss": None,
        **_evaluated(job, evaluated[-1] if evaluated else {}),
        "seconds": state.elapsed_s,
        "tokens": state.tokens,
        "tokens_per_s": tokens_per_second(rows),
        "stopped_early": state.step < job.steps_total,
    }


def _evaluated(job: Job[RunConfig], row: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation; ``eval_sets`` has those of named sets: ``{news: {loss: 1.2}}``."""
    sets: dict[str, dict[str, Any]] = {name: {} for name in named_sets(job.config.data.eval)}
    whole: dict[str, Any] = {}
    for key, value in row.items():
        if name := set_of(key, sets):
            sets[name][key.removeprefix("eval_").removesuffix(f"_{name}")] = value
        elif key.startswith("eval_"):
            whole[key] = value
    return whole | ({"eval_sets": sets} if sets and row else {})


def _best(run: RunDir, state: TrainingState) -> dict[str, Any] | None:
    """The step with the lowest held-out loss, and its checkpoint if there is one."""
    if state.best is None:
        return None
    folder = run.checkpoints / f"step-{state.best['step']:06d}"
    return {**state.best, "checkpoint": f"checkpoints/{folder.name}" if folder.is_dir() else None}


def _tell_best(console: Console, run: RunDir, best: dict[str, Any], *, steps: int) -> None:
    if best["step"] == steps:
        return
    console.note(
        f"lowest held-out loss: {best['eval_loss']:.4f} at step {best['step']:,}; the result is of step {steps:,}"
    )
    if best["checkpoint"] is not None:
        again = repeating(run.path, read_manifest(run.path))
        place, checkpoint = shell_word(f"{run.path}-best"), shell_word(run.path / best["checkpoint"])
        console.note(f"  {again} max_steps={best['step']} -o {place} --resume {checkpoint}")


def _write_report(run: RunDir, state: TrainingState, console: Console) -> None:
    """The page, and the picture if there are several steps: one step has no curve, and matplotlib is slow to load."""
    has_curves = state.step > 1
    if write_report([run.path], with_picture=has_curves)[1] is None and has_curves:
        console.note(NO_PICTURE)


def _write_card(job: Job[RunConfig], run: RunDir, summary: dict[str, Any]) -> None:
    run.write_text("README.md", model_card(job, read_manifest(run.path), summary))


def next_commands(run: Path, method: str) -> list[str]:
    """What a user would type next."""
    short = str(run) if run.is_absolute() else os.path.relpath(run)
    path, merged = shell_word(short), shell_word(f"{short}-merged")
    return [f"tt chat {path}", *([f"tt merge {path} -o {merged}"] if method != "full" else []), f"tt report {path}"]
