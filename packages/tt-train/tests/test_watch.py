"""What is measured beside the steps: held-out loss before and between them, the best step, early stop, loggers."""

import json
import os
import sys
import types

import pytest
import torch

import tt_ckpt
from tt_train import compose
from tt_train.recipes import sft
from tt_train.run.console import Console
from tt_train.run_files import read_json, read_rows


class Heard(Console):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    warn = note


@pytest.fixture
def train(words, monkeypatch):
    monkeypatch.setattr("tt_train.run.finish.write_report", lambda runs: ("", ""))

    def run(path, *more, console=None, **kwargs):
        small = ["samples.num=0", "adapter.rank=2", "data.eval=0.2", "eval_every=1"]
        config = compose("sft", overrides=[*words, *small, *more, f"output_dir={path}"])
        return sft.main(config, console=console or Heard(), **kwargs)

    return run


@pytest.fixture
def held_out(monkeypatch):
    """``held_out(3.0, 2.0, ...)``: what the evaluations find, the one before step 1 first."""

    def plan(*figures):
        found = iter(figures)
        monkeypatch.setattr("tt_train.run.loop.held_out_figures", lambda *args, **kwargs: {"eval_loss": next(found)})

    return plan


def evaluated(path):
    return [(row["step"], row["eval_loss"]) for row in read_rows(path / "metrics.jsonl") if "eval_loss" in row]


def test_the_held_out_loss_before_step_1_is_that_of_the_base(train, tmp_path, model_dir):
    from tt_train import load
    from tt_train.evaluate import held_out_figures
    from tt_train.job import assemble
    from tt_train.losses import cross_entropy

    path = train(tmp_path / "r", "max_steps=2", "eval_every=null")
    assert [step for step, _ in evaluated(path)] == [0, 2]
    config = compose("sft", overrides=[f"model.path={model_dir}", "model.dtype=fp32", "data.eval=0.2",
                     f"data.train={read_json(path / 'manifest.json')['config']['data']['train']}"])  # fmt: skip
    model, tokenizer = load(model_dir, device="cpu", dtype=torch.float32)
    options = {"micro_batch_size": 4, "pad_id": tokenizer.pad_id, "device": torch.device("cpu")}
    expected = held_out_figures(model, assemble(config).held_out, cross_entropy, **options)["eval_loss"]
    assert evaluated(path)[0][1] == pytest.approx(expected, rel=1e-6)


def test_the_best_checkpoint_survives_pruning_and_is_named(train, tmp_path, held_out):
    held_out(9.0, 3.0, 2.0, 2.5, 2.4, 2.6, 2.7)
    console = Heard()
    path = train(tmp_path / "r", "save_every=1", console=console)
    best = read_json(path / "manifest.json")["best"]
    assert best == {"step": 2, "eval_loss": 2.0, "checkpoint": "checkpoints/step-000002"}
    kept = sorted(entry.name for entry in (path / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000005", "step-000006"]
    (command,) = [line for line in console.said if "--resume" in line]
    assert f"max_steps=2 -o {path}-best --resume {path}/checkpoints/step-000002" in command


def test_a_best_step_between_two_saves_is_saved_too(train, tmp_path, held_out):
    held_out(9.0, 3.0, 2.0, 2.5, 2.4, 2.6, 2.7)
    path = train(tmp_path / "r", "save_every=5")
    assert sorted(entry.name[-1] for entry in (path / "checkpoints").iterdir()) == ["2", "5", "6"]


def test_a_run_stops_early_and_says_so(train, tmp_path, held_out):
    held_out(9.0, 3.0, 2.0, 2.5, 2.0, 1.0)
    console = Heard()
    path = train(tmp_path / "r", "early_stop_after=2", "max_steps=30", "schedule.name=constant", console=console)
    assert [step for step, _ in evaluated(path)] == [0, 1, 2, 3, 4]
    assert any("stopped early after step 4: 2 evaluations without a lower held-out loss than 2.0000" in line
               for line in console.said)  # fmt: skip
    manifest = read_json(path / "manifest.json")
    summary = manifest["summary"]
    assert (manifest["state"], summary["steps"], summary["stopped_early"]) == ("finished", 4, True)
    assert manifest["best"]["step"] == 2
    assert (path / "checkpoints" / "step-000002").is_dir()

    again = Heard()
    held_out()
    more = ["early_stop_after=2", "max_steps=30", "schedule.name=constant"]
    assert train(path, *more, resume="auto", console=again) == path
    assert "nothing is left to do" in again.said[-1]
    held_out(1.5, 1.6, 1.7, 1.8)
    train(path, "early_stop_after=3", "max_steps=30", "schedule.name=constant", resume="auto")
    assert [step for step, _ in evaluated(path)] == list(range(9))
    assert read_json(path / "manifest.json")["best"]["step"] == 5


def test_patience_and_best_survive_a_resume(train, tmp_path, held_out):
    held_out(9.0, 3.0, 2.0, 2.5)
    path = train(tmp_path / "r", "early_stop_after=2", "save_every=1", "max_steps=3", "schedule.name=constant")
    held_out(2.2, 2.3)
    train(path, "early_stop_after=2", "save_every=1", "max_steps=9", "schedule.name=constant", resume="auto")
    assert [step for step, _ in evaluated(path)] == [0, 1, 2, 3, 4]
    assert (path / "checkpoints" / "step-000002").is_dir()


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(train, tmp_path, held_out):
    held_out(9.0, float("nan"), 2.0, float("nan"))
    path = train(tmp_path / "r", "max_steps=3", "save_every=1")
    assert read_json(path / "manifest.json")["best"]["step"] == 2
    assert evaluated(path)[1] == (1, None)


# ---- loggers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the client, which records what it is told."""
    calls = []

    class Run:
        def log(self, row, step):
            calls.append(("log", step, row["loss"]))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    client = types.ModuleType("wandb")
    client.setup = lambda: calls.append(("setup", os.getcwd()))
    client.Settings = dict
    client.init = lambda **options: calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setattr("tt_train.inputs.components.logger_mistakes", lambda *args: [])
    return calls


def test_weights_and_biases_continues_the_same_run_and_is_finished_also_by_a_failure(
    train, tmp_path, wandb, monkeypatch
):
    more = ["loggers=[wandb]", "data.eval=null", "eval_every=null"]
    with monkeypatch.context() as patch:
        patch.setattr("tt_train.run.finish.write_result", raise_planted)
        with pytest.raises(OSError, match="planted"):
            train(tmp_path / "r", *more, "max_steps=2")
    assert wandb[-1] == ("finish", 1)
    train(tmp_path / "r", *more, "max_steps=2", resume="auto")
    assert wandb[-1] == ("finish", 0)
    first, second = (options for kind, options in (call for call in wandb if call[0] == "init"))
    assert first["id"] == second["id"] == read_json(tmp_path / "r" / "manifest.json")["wandb_id"]
    assert first["resume"] == "allow"
    assert sorted(call[1] for call in wandb if call[0] == "log") == [1, 2]


def test_weights_and_biases_reads_no_settings_of_the_working_folder_and_starts_no_git(
    train, tmp_path, wandb, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train("r", "loggers=[wandb]", "data.eval=null", "eval_every=null", "max_steps=1")
    assert [call[1] for call in wandb if call[0] == "setup"] not in ([], [str(tmp_path)])
    (options,) = [call[1] for call in wandb if call[0] == "init"]
    assert options["dir"] == str(tmp_path / "r")  # its service, started elsewhere, takes no relative path
    assert options["settings"] == {"disable_git": True, "save_code": False}


def test_loggers_get_no_secret(train, tmp_path, wandb, monkeypatch, rows_file):
    data = tmp_path / "canary-in-a-name.jsonl"
    data.write_bytes(rows_file.read_bytes())
    monkeypatch.setenv("MY_TOKEN", "canary-in-a-name")
    train(tmp_path / "r", "loggers=[wandb]", "data.eval=null", "eval_every=null", "max_steps=1", f"data.train={data}")
    (options,) = (options for kind, options in (call for call in wandb if call[0] == "init"))
    assert options["config"]["data"]["train"].endswith("[redacted].jsonl")
    assert "canary" not in json.dumps(options, default=str)


@pytest.mark.parametrize("url", ["http://wandb.example", "http://127.0.0.2:1", "nonsense"])
def test_the_key_of_a_logger_goes_over_no_plain_http(monkeypatch, url):
    from tt_train.config import SFTConfig
    from tt_train.inputs.components import logger_mistakes

    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert any(line.startswith("WANDB_BASE_URL: ") for line in logger_mistakes(SFTConfig(loggers=["wandb"])))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not any("WANDB" in line for line in logger_mistakes(SFTConfig(loggers=["wandb"])))


def raise_planted(*args):
    raise OSError("planted")


def test_tensorboard_is_cut_back_to_the_step_that_is_resumed(train, tmp_path, monkeypatch):
    opened = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            opened.append([purge_step, False])
            import pathlib

            pathlib.Path(folder).mkdir(exist_ok=True)

        def add_scalar(self, key, value, step):
            assert step > 0

        def flush(self):
            pass

        def close(self):
            opened[-1][1] = True

    module = types.ModuleType("torch.utils.tensorboard.writer")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    monkeypatch.setattr("tt_train.inputs.components.logger_mistakes", lambda *args: [])
    more = ["loggers=[tensorboard]", "data.eval=null", "eval_every=null", "schedule.name=constant"]
    train(tmp_path / "r", *more, "max_steps=2")
    train(tmp_path / "r", *more, "max_steps=4", resume="auto")
    assert opened == [[None, True], [3, True]]


def test_the_best_is_told_apart_by_its_checkpoint(train, tmp_path):
    path = train(tmp_path / "r", "max_steps=3", "save_every=1")
    best = read_json(path / "manifest.json")["best"]
    lowest = min((loss, step) for step, loss in evaluated(path) if step)
    assert (best["eval_loss"], best["step"]) == lowest
    assert tt_ckpt.TrainCheckpoint(path / "checkpoints").restore(path / best["checkpoint"]).step == best["step"]


def test_what_takes_its_time_before_step_1_is_said_before_it_is_done(train, tmp_path, monkeypatch):
    console, heard = Heard(), []
    figures = {"eval_loss": 1.0}
    monkeypatch.setattr("tt_train.run.loop.held_out_figures", lambda *_, **__: heard.extend(console.said) or figures)
    train(tmp_path / "r", "max_steps=1", "samples.num=2", console=console)
    assert "before step 1: evaluating 7 held-out rows and answering 2 prompts ..." in heard
