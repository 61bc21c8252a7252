"""What is measured beside the steps: held-out loss before and between them, the best step, early stop."""

import pytest
import torch

import tt_ckpt
from tt_train import compose
from tt_train.recipes import sft
from tt_train.records.run_files import read_json, read_rows
from tt_train.run.console import Console


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
    from tt_train.losses.cross_entropy import cross_entropy

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
