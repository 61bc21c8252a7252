"""What if this fails now? Every call that a run makes, one after the other."""

import importlib

import pytest

import tt_ckpt
from tt_train import compose
from tt_train.console import Console
from tt_train.recipes import sft
from tt_train.run_dir import list_runs, read_json, read_rows


class Heard(Console):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    warn = note


@pytest.fixture
def train(words, monkeypatch):
    monkeypatch.setattr("tt_train.recipes._end.write_report", lambda runs: None)

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
    "tt_train.recipes.sft:to_device": (3, 5),
    "tt_train.recipes.sft:train_step": (1, 2, 3),
    "tt_train.recipes.sft:finish": (1,),
    "tt_train.recipes._watch:held_out_loss": (1, 2, 3),
    "tt_train.recipes._watch:answer": (1, 2, 3),
    "tt_train.recipes._watch:peak_memory_gib": (1, 3),
    "tt_train.recipes._end:write_result": (1,),
    "tt_train.recipes._end:model_card": (1,),
    "tt_train.recipes._end:write_report": (1,),
    "tt_train.run_dir:RunDir.append": (1, 3, 5),
    "tt_train.run_dir:RunDir.finished": (1,),
    "tt_train.training_state:TrainingState.save_if_due": (1, 2),
    "tt_ckpt:TrainCheckpoint.save": (1,),
    "tt_peft:save_adapter": (1,),
    "torch.optim:AdamW.step": (1, 2, 3),
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
        assert any("steps are lost" in line for line in console.said)


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
