"""Resuming: what is continued, what is refused, and what is never spoiled."""

import json
import os
import shutil
import signal

import pytest
import torch

import tt_ckpt
from tt_train import ConfigError, Interrupted, compose, load
from tt_train.recipes import sft
from tt_train.records.run_files import read_json, read_rows
from tt_train.run.console import Console
from tt_train.run.listing import list_runs
from tt_train.run.lock import RunLock


class Heard(Console):
    """Keeps what it hears; sends itself ``signal_number`` after step ``stop_at``."""

    def __init__(self, stop_at=None, signal_number=signal.SIGTERM):
        self.said, self.stop_at, self.signal_number = [], stop_at, signal_number

    def note(self, text):
        self.said.append(text)

    warn = note

    def step(self, row):
        if row["step"] == self.stop_at:
            os.kill(os.getpid(), self.signal_number)


@pytest.fixture
def train(words, monkeypatch):
    """``train(path, *overrides, resume=..., console=...)``: a run without its report, which takes most of the time."""
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs, **more: ("", ""))

    def run(path, *more, console=None, **kwargs):
        overrides = [*words, "samples.num=1", "max_steps=4", *more]
        if path is not None:
            overrides.append(f"output_dir={path}")
        return sft.main(compose("sft", overrides=overrides), console=console or Heard(), **kwargs)

    return run


def losses(path):
    return [row["loss"] for row in read_rows(path / "metrics.jsonl") if row["step"]]


def steps(path):
    return [row["step"] for row in read_rows(path / "metrics.jsonl")]


def state(path):
    return read_json(path / "manifest.json")["state"]


def content(path):
    """Every file below ``path`` but its lock, as bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def same_weights(first, second):
    one, other = (dict(load(path, device="cpu")[0].named_parameters()) for path in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ADAPTERS = [[], ["adapter.rank=4"]]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_finished_run_has_nothing_left_to_do_and_stays_as_it_is(train, tmp_path, adapter):
    path = train(tmp_path / "r", *adapter)
    before, console = content(path), Heard()
    assert train(path, *adapter, resume="auto", console=console) == path
    assert "nothing is left to do" in console.said[-1]
    assert content(path) == before


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_finished_run_is_continued_to_a_larger_number_of_steps(train, tmp_path, adapter):
    constant = ["schedule.name=constant", *adapter]
    path = train(tmp_path / "r", *constant, "max_steps=2")
    train(path, *constant, resume="auto")
    whole = train(tmp_path / "whole", *constant)
    assert losses(path) == losses(whole)
    assert same_weights(path, whole)
    assert state(path) == "finished"
    assert "max_steps: 4" in (path / "config.yaml").read_text()
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith(".")]


def test_a_longer_run_says_that_its_rate_is_another(train, tmp_path):
    path, console = train(tmp_path / "r", "max_steps=3"), Heard()
    train(path, resume="auto", console=console)
    assert any("from 3 to 4 steps" in line and "learning rate" in line for line in console.said)


@pytest.mark.parametrize("where", ["load_model", "train_step", "finish"])
def test_a_longer_run_that_fails_leaves_the_finished_one_finished(train, tmp_path, monkeypatch, where):
    path = train(tmp_path / "r", "max_steps=2")
    result = (path / "model" / "model.safetensors").read_bytes()
    target = ("tt_train.run.finish.write_result", sft) if where == "finish" else (None, sft)
    with monkeypatch.context() as patch:
        if target[0]:
            patch.setattr(target[0], lambda *args: fail())
        else:
            patch.setattr(sft, where, lambda *args, **kwargs: fail())
        with pytest.raises(OSError, match="planted"):
            train(path, resume="auto")
    assert state(path) == "finished"
    assert (path / "model" / "model.safetensors").read_bytes() == result
    assert list_runs(tmp_path)[0]["state"] == ("finished" if where == "load_model" else "failed")
    train(path, resume="auto")
    assert steps(path) == [1, 2, 3, 4]
    assert list_runs(tmp_path)[0]["state"] == "finished"


def fail():
    raise OSError(28, "planted: No space left on device")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_stopped_after_every_step_ends_in_the_same_bits(train, tmp_path, adapter):
    whole, path = train(tmp_path / "whole", *adapter), tmp_path / "cut"
    for step in range(1, 4):
        with pytest.raises(Interrupted) as stopped:
            train(path, *adapter, console=Heard(stop_at=step), resume="auto")
        assert stopped.value.checkpoint.endswith(f"step-00000{step}")
        assert "continue with --resume auto" in str(stopped.value)
    train(path, *adapter, resume="auto")
    assert losses(path) == losses(whole)
    assert steps(path) == [1, 2, 3, 4]
    assert same_weights(path, whole)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_named_checkpoint_of_the_run_is_continued_exactly_and_later_ones_are_made_anew(train, tmp_path, adapter):
    more = ["save_every=1", "keep_last=9", *adapter]
    path = train(tmp_path / "r", *more)
    before, console = losses(path), Heard()
    shutil.copytree(path, tmp_path / "copy")
    train(path, *more, resume=path / "checkpoints" / "step-000002", console=console)
    assert losses(path) == before
    assert same_weights(path, tmp_path / "copy")
    assert any("step-000003, step-000004 removed" in line for line in console.said)
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == [f"step-00000{n}" for n in range(1, 5)]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("named", ["checkpoints/step-000002", "."])
def test_a_new_run_begins_from_a_checkpoint_of_another_which_stays_as_it_is(train, tmp_path, adapter, named):
    more = ["save_every=2", "schedule.name=constant", *adapter]
    old = train(tmp_path / "old", *more, "max_steps=3" if named == "." else "max_steps=4", "keep_last=5")
    before = content(old)
    new = train(tmp_path / "new", *more, "max_steps=4", "keep_last=5", resume=old / named)
    assert content(old) == before
    assert steps(new) == [1, 2, 3, 4]
    whole = train(tmp_path / "whole", *more, "max_steps=4")
    assert losses(new) == losses(whole)
    assert same_weights(new, whole)
    assert read_json(new / "manifest.json")["continued_from"] == {"run": str(old), "step": 3 if named == "." else 2}


def test_a_result_of_an_earlier_step_is_made_from_its_checkpoint(train, tmp_path):
    old = train(tmp_path / "old", "save_every=1", "keep_last=4", "schedule.name=constant")
    short = train(tmp_path / "short", "max_steps=2", "schedule.name=constant")
    new = train(tmp_path / "new", "schedule.name=constant", "max_steps=2", resume=old / "checkpoints" / "step-000002")
    assert same_weights(new, short)
    assert state(new) == "finished"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["seed=5"], "seed: 0 -> 5"),
        (["max_steps=1"], "after the last step"),
        (["output_dir=taken"], "is not empty"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(train, tmp_path, monkeypatch, more, expected):
    monkeypatch.chdir(tmp_path)
    old = train(tmp_path / "old", "save_every=2")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        train(None, "output_dir=new", *more, resume=old / "checkpoints" / "step-000002")
    assert content(tmp_path) == before


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(train, tmp_path):
    old = train(tmp_path / "old", "save_every=2")
    with pytest.raises(ConfigError, match="step-000003 does not exist.*there are step-000002, step-000004"):
        train(tmp_path / "new", resume=old / "checkpoints" / "step-000003")
    assert not (tmp_path / "new").exists()


def damage(checkpoint):
    file = next(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff\xff")


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_is_no_quiet_new_start(train, tmp_path):
    path = train(tmp_path / "r", "save_every=2", "max_steps=4", "schedule.name=constant")
    damage(path / "checkpoints" / "step-000004")
    train(path, "save_every=2", "max_steps=6", "schedule.name=constant", resume="auto")
    assert losses(path) == losses(train(tmp_path / "whole", "max_steps=6", "schedule.name=constant"))
    for checkpoint in (path / "checkpoints").iterdir():
        damage(checkpoint)
    before = content(path)
    with pytest.raises(ConfigError, match=r"every checkpoint of .* is damaged \(step-000004, step-000006\)"):
        train(path, "schedule.name=constant", "max_steps=8", resume="auto")
    with pytest.raises(ConfigError, match="step-000006.*choose another checkpoint"):
        train(path, "schedule.name=constant", "max_steps=8", resume=path / "checkpoints" / "step-000006")
    assert content(path) == before


def test_a_finished_run_without_a_checkpoint_is_not_started_anew(train, tmp_path):
    path = train(tmp_path / "r", "save_last=false", "adapter.rank=2")
    assert not list((path / "checkpoints").iterdir())
    before = content(path)
    with pytest.raises(ConfigError, match="kept no checkpoint.*adapter.path="):
        train(path, "adapter.rank=2", "max_steps=8", resume="auto")
    assert content(path) == before
    assert train(path, "save_last=false", "adapter.rank=2", resume="auto") == path


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_and_says_so(train, tmp_path):
    path, console = tmp_path / "r", Heard()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        train(path, console=Heard(stop_at=3, signal_number=signal.SIGKILL))
        os._exit(1)
    os.waitpid(child, 0)
    assert list_runs(tmp_path)[0]["state"] == "dead"
    with pytest.raises(ConfigError, match="no checkpoint to continue from"):
        train(path, resume=path)
    train(path, resume="auto", console=console)
    assert any("training starts at step 1" in line for line in console.said)
    assert steps(path) == [1, 2, 3, 4]


def test_one_process_writes_to_a_run(train, tmp_path):
    path = train(tmp_path / "r", "max_steps=2")
    before = content(path)
    other = RunLock(path)
    other.acquire()
    with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()}"):
        train(path, resume="auto")
    other.release()
    assert content(path) == before
    train(path, resume="auto")
    assert not (path / "run.lock").exists()


def test_a_key_that_is_new_since_the_run_was_made_has_its_default(train, tmp_path):
    path = train(tmp_path / "r", "max_steps=2")
    manifest = read_json(path / "manifest.json")
    del manifest["config"]["data"]["shuffle"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data.shuffle: true -> false"):
        train(path, "data.shuffle=false", resume="auto")
    train(path, resume="auto")


def test_the_state_of_a_checkpoint_names_its_place(train, tmp_path):
    path = train(tmp_path / "r")
    saved = tt_ckpt.TrainCheckpoint(path / "checkpoints").restore()
    assert (saved.step, saved.state["steps_total"]) == (4, 4)
    assert saved.state["tokens"] == list(read_rows(path / "metrics.jsonl"))[-1]["tokens"]


def test_nobody_advises_to_resume_what_would_start_at_step_1(train, tmp_path, monkeypatch):
    from tt_train.run.dir import results_of

    path = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(sft, "train_step", lambda *args, **kwargs: fail())
        with pytest.raises(OSError, match="planted"):
            train(path)
    for ask in (results_of, load):
        with pytest.raises(ConfigError, match="checkpoint") as caught:
            ask(path)
        assert "--resume" not in str(caught.value)
    with pytest.raises(Interrupted):
        train(path, console=Heard(stop_at=1), resume="auto")
    with pytest.raises(ConfigError, match="no results yet; continue it with --resume auto"):
        results_of(path)
