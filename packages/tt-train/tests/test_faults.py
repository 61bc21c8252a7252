"""What if this fails now? Every call that a run makes, one after the other."""

import errno
import importlib
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tt_ckpt
import tt_data
from tt_ckpt import files
from tt_train import ConfigError, Interrupted, compose
from tt_train.recipes import sft
from tt_train.records.run_files import read_json, read_rows
from tt_train.run.console import Console
from tt_train.run.listing import list_runs


class Heard(Console):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    warn = note


@pytest.fixture
def train(words, monkeypatch):
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))

    def run(path, *more, console=None, **kwargs):
        small = [
            "samples.num=1",
            "samples.max_new_tokens=2",
            "max_steps=3",
            "data.eval=0.2",
            "eval_every=2",
            "adapter.rank=2",
        ]
        overrides = [*words, *small, *more, f"output_dir={path}"]
        return sft.main(compose("sft", overrides=overrides), console=console or Heard(), **kwargs)

    return run


def figures(path):
    keys = ("step", "loss", "eval_loss", "tokens")
    return [{key: row.get(key) for key in keys} for row in read_rows(path / "metrics.jsonl")]


def weights(path):
    saved = tt_ckpt.TrainCheckpoint(path / "checkpoints").restore()
    return {name: tensor.clone() for name, tensor in saved.tensors["adapter"].items()}


def failing(target, call, error):
    """A stand-in for ``target`` whose ``call``-th call (from 1) raises ``error``; later ones work again."""
    calls = 0

    def stand_in(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return target(*args, **kwargs)

    return stand_in


# where, and which calls: the first within the run, one in the middle, the last
PLACES = {
    "tt_train.recipes.sft:learning_rate": (1, 2, 3),
    "tt_train.recipes.sft:set_learning_rate": (2,),
    "tt_train.run.loop:to_device": (3, 5),
    "tt_train.recipes.sft:train_step": (1, 2, 3),
    "tt_train.recipes.sft:finish": (1,),
    "tt_train.run.loop:held_out_figures": (1, 2, 3),
    "tt_train.run.loop:answer": (1, 2, 3),
    "tt_train.run.loop:memory_gib": (1, 3),
    "tt_train.run.finish:write_result": (1,),
    "tt_train.run.finish:model_card": (1,),
    "tt_train.run.finish:write_report": (1,),
    "tt_train.run.dir:RunDir.append": (1, 3, 5),
    "tt_train.run.dir:RunDir.finished": (1,),
    "tt_train.run.checkpoints:TrainingState.save_if_due": (1, 2),
    "tt_ckpt:TrainCheckpoint.save": (1,),
    "tt_peft:save_adapter": (1,),
    "tt_train.optim.master_weights:call": (2, 3, 4),  # the first is a trial before weights load
    "torch.nn.utils:get_total_norm": (2,),
}
ERRORS = [OSError, MemoryError, KeyboardInterrupt]
SWEEP = [(place, call) for place, calls in PLACES.items() for call in calls]


@pytest.mark.parametrize(
    ("place", "call", "error"), [(*each, ERRORS[number % len(ERRORS)]) for number, each in enumerate(SWEEP)]
)
def test_whatever_fails_a_state_or_a_result_is_left_and_resuming_ends_as_if_nothing_had(
    train, tmp_path, monkeypatch, place, call, error, whole
):
    module, _, name = place.partition(":")
    owner, path, console, caught = importlib.import_module(module), tmp_path / "r", Heard(), None
    *parents, name = name.split(".")
    for part in parents:
        owner = getattr(owner, part)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), call, error(28, "planted")))
        try:
            train(path, console=console)
        except (OSError, MemoryError, KeyboardInterrupt, RuntimeError) as problem:
            caught = problem
    if caught is None:
        assert list_runs(tmp_path)[0]["state"] == "finished"
        assert any("the result is safe" in line or "not saved" in line for line in console.said)
    else:
        assert list_runs(tmp_path)[0]["state"] in ("failed", "stopped")
        check_advice(path, console, caught)
    assert not (path / "run.lock").exists()
    train(path, resume="auto")
    assert figures(path) == whole[0]
    assert all((weights(path)[key] == tensor).all() for key, tensor in whole[1].items())
    assert read_json(path / "manifest.json")["state"] == "finished"
    assert (path / "adapter" / "adapter_model.safetensors").is_file()


def check_advice(path, console, caught):
    """To resume is advised if and only if there is something to resume from, and nothing recorded is lost."""
    made = max((row["step"] for row in figures(path)), default=0)
    checkpoints = sorted(entry.name for entry in (path / "checkpoints").glob("step-*"))
    advice = [line for line in console.said if "--resume auto" in line]
    assert bool(advice) == bool(checkpoints)
    if checkpoints:
        assert f"{path}/checkpoints/{checkpoints[-1]}" in advice[-1]
        assert advice[-1] in caught.__notes__
        assert int(checkpoints[-1].removeprefix("step-")) >= made
    elif made:
        assert any("lost, since no checkpoint" in line for line in console.said)


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def whole(train, tmp_path, known):
    """Figures and weights of the run that nothing happens to."""
    if not known:
        path = train(tmp_path / "whole")
        known["whole"] = figures(path), weights(path)
    return known["whole"]


# ---- disks, workers and signals as they are ------------------------------------------------------------------------


class Full:
    """A file of a disk that has filled up: it opens, and every write fails without naming the file."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_disk_that_fills_under_a_file_of_figures_is_one_line_that_names_it_and_the_state_is_kept(
    train, tmp_path, monkeypatch, whole, name
):
    real, path, console, opens = files.appending, tmp_path / "r", Heard(), []

    def opened(path, *more):
        file = real(path, *more)
        opens.extend([path] if Path(path).name == name else [])
        return Full(file) if Path(path).name == name and len(opens) > 1 else file

    with monkeypatch.context() as patch:
        patch.setattr(files, "appending", opened)
        with pytest.raises(OSError, match="No space left") as caught:
            train(path, console=console)
    assert caught.value.filename == str(path / name)
    assert any("continue from there with --resume auto" in line for line in console.said)
    train(path, resume="auto")
    assert figures(path) == whole[0]


def test_a_disk_that_fills_under_the_log_is_an_error_and_no_trace_on_stderr(train, tmp_path, monkeypatch, capsys):
    path, console = tmp_path / "r", Heard()

    def full(self, record):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            self.handleError(record)

    monkeypatch.setattr("tt_train.run.dir._LogFile.emit", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train(path, console=console)
    assert caught.value.filename == str(path / "train.log")
    assert "Traceback" not in capsys.readouterr().err
    assert any("continue from there with --resume auto" in line for line in console.said)


def test_too_small_a_disk_is_found_before_step_1(train, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(sft, "steps", lambda *args: pytest.fail("a step was made"))
    with pytest.raises(ConfigError, match=r"output_dir: .* free, 1 checkpoint and the result need .*choose another"):
        train(tmp_path / "r")


def test_the_advice_for_too_small_a_disk_names_only_keys_that_are_set_and_help(train, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for number, (more, advice) in enumerate({
        ("save_every=null",): "",
        ("save_every=1", "keep_last=2", "max_steps=6"): "; or raise save_every",
        ("save_every=1", "keep_last=4", "max_steps=6"): "; or raise save_every; or lower keep_last",
        ("save_every=6", "keep_last=4", "max_steps=6"): "",
    }.items()):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            train(tmp_path / f"r{number}", *more, "data.eval=null", "eval_every=null")
        assert str(caught.value).endswith(f"choose another output directory{advice}"), more


def test_a_disk_without_room_for_a_file_is_one_line_before_step_1(train, tmp_path, monkeypatch):
    def full(self, nbytes, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.directory / "probe"))

    monkeypatch.setattr(tt_ckpt.TrainCheckpoint, "preflight", full)
    with pytest.raises(ConfigError, match=r"output_dir: .*probe: No space left on device; choose another -o$"):
        train(tmp_path / "r")


def test_the_room_that_is_asked_for_is_what_the_run_then_takes(train, tmp_path, monkeypatch):
    """Checkpoints as they come out, and the result, fit into what the check before step 1 asks for; little is left."""
    asked = []
    real = tt_ckpt.TrainCheckpoint.preflight

    def note(self, nbytes, *, copies, besides):
        asked.append((nbytes, copies, besides))
        real(self, nbytes, copies=copies, besides=besides)

    monkeypatch.setattr(tt_ckpt.TrainCheckpoint, "preflight", note)
    for more in (["adapter=null", "model.dtype=bf16"], []):
        path = train(tmp_path / f"r{len(asked)}", *more, "save_every=1", "data.eval=null", "eval_every=null")
        nbytes, copies, besides = asked[-1]
        checkpoint = next((path / "checkpoints").iterdir())
        groups = tt_ckpt.TrainCheckpoint(path / "checkpoints").restore(checkpoint).tensors.values()
        written = sum(tensor.nbytes for group in groups for tensor in group.values())
        result = sum(t.nbytes for file in path.glob("*/*.safetensors") for t in load_file(file).values())
        assert written - 4 * 100 < nbytes <= written  # AdamW counts its steps once per parameter
        beside = sum(file.stat().st_size for file in path.glob("model/*.*") if file.suffix != ".safetensors")
        assert besides == pytest.approx(result + beside, rel=0.01)  # with the tokenizer of a full model
        assert copies == 3


def hang_at(dataset, index):
    real = type(dataset).__getitem__

    class Hanging(type(dataset)):
        def __getitem__(self, row):
            if row == index and multiprocessing.parent_process() is not None:
                time.sleep(600)
            return real(self, row)

    dataset.__class__ = Hanging


def test_a_worker_that_hangs_ends_the_run_within_its_limit_and_its_rows_are_named(train, tmp_path, monkeypatch):
    real, path, console = sft.assemble, tmp_path / "r", Heard()

    def assemble(config, **kwargs):
        job = real(config, **kwargs)
        hang_at(job.train, tt_data.rows_at(1, num_rows=len(job.train), batch_size=8, seed=0)[0])
        return job

    monkeypatch.setattr(sft, "assemble", assemble)
    workers = ["data.num_workers=1", "data.worker_timeout_s=1", "data.eval=null", "eval_every=null"]
    with pytest.raises(RuntimeError, match=r"step 1: a data worker did not answer within 1 s .*rows\.jsonl:\d+"):
        train(path, *workers, console=console)
    assert any("step-000001; continue from there" in line for line in console.said)
    assert not multiprocessing.active_children()


PHASES = {
    "loading": "tt_train.recipes.sft:load_model",
    "the first step": "tt_train.recipes.sft:train_step",
    "evaluating": "tt_train.run.loop:held_out_figures",
    "sampling": "tt_train.run.loop:answer",
    "saving": "tt_ckpt:TrainCheckpoint.save",
    "writing the result": "tt_train.run.finish:write_result",
    "the card": "tt_train.run.finish:model_card",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_in_any_phase_ends_a_run_that_resuming_completes(
    train, tmp_path, monkeypatch, whole, number, phase, call
):
    module, _, name = PHASES[phase].partition(":")
    owner, path = importlib.import_module(module), tmp_path / "r"
    *parents, name = name.split(".")
    for part in parents:
        owner = getattr(owner, part)
    real, calls, stopped = getattr(owner, name), [], None

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        try:
            train(path, "save_every=1")
        except Interrupted as interrupted:
            stopped = interrupted
    state = list_runs(tmp_path)[0]["state"]
    if stopped is None:  # it came when nothing was left to stop, or not at all
        assert state == "finished"
    else:
        assert (state, stopped.exit_code) == ("stopped", 128 + number)
        assert (stopped.checkpoint is None) == (not list((path / "checkpoints").glob("step-*")))
        assert ("--resume auto" in str(stopped)) == (stopped.checkpoint is not None)
    assert signal.getsignal(number) == before
    train(path, "save_every=1", resume="auto")
    assert figures(path) == whole[0]
    assert all((weights(path)[key] == tensor).all() for key, tensor in whole[1].items())


def test_a_second_signal_ends_the_process_at_once(train, tmp_path):
    child = os.fork()
    if child == 0:
        signal.alarm(60)

        class Twice(Heard):
            def step(self, row):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

        train(tmp_path / "r", console=Twice())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert list_runs(tmp_path)[0]["state"] == "dead"
