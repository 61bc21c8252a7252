"""``tt ls runs``: order, choice and figures."""

import json
import os
from pathlib import Path

import pytest


def make(name: str, *, when: int, rows: list[dict], size: int = 0, **manifest) -> Path:
    run = Path("runs") / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: sft\n")
    (run / "manifest.json").write_text(json.dumps({"state": "finished", "recipe": "sft", **manifest}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "weights").write_bytes(bytes(size))
    os.utime(run / "manifest.json", (when, when))
    return run


def row(step: int, loss: float | None, eval_loss: float | None = None) -> dict:
    return {"step": step, "loss": loss, "tokens": step, "epoch": 0.1, "eval_loss": eval_loss}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("old", when=1000, rows=[row(0, None, 0.5), row(1, 3.0, 2.0), row(2, 2.0, 2.5)], size=10,
         base_model="org/Qwen3-0.6B", method="lora", steps_total=4)  # fmt: skip
    make("new", when=3000, rows=[row(1, 1.0)], size=5000,
         base_model="/far/away/from/meta-llama/Llama-3.2-1B-Instruct",
         method="full", state="stopped")  # fmt: skip
    make("mid", when=2000, rows=[row(1, 9.0, 1.0)], recipe="dpo", base_model="org/Qwen3-4B", method="dora",
         best={"step": 1, "eval_loss": 1.0, "checkpoint": None})  # fmt: skip


def names(tt, *words: str) -> list[str]:
    return [Path(run["path"]).name for run in tt("ls", "runs", *words, "--json").json["runs"]]


@pytest.mark.parametrize(("words", "found"), [
    ([], ["new", "mid", "old"]),
    (["--sort", "time"], ["new", "mid", "old"]),
    (["--sort", "loss"], ["mid", "old", "new"]),
    (["--sort", "size"], ["new", "old", "mid"]),
    (["--recipe", "sft"], ["new", "old"]),
    (["--recipe", "lora_dpo_single_device"], ["mid"]),
    (["--base", "qwen3"], ["mid", "old"]),
    (["--status", "stopped"], ["new"]),
    (["--status", "finished", "--base", "4b", "--sort", "loss"], ["mid"]),
    (["--status", "failed"], []),
])  # fmt: skip
def test_runs_are_sorted_and_chosen(tt, words, found):
    assert names(tt, *words) == found


def test_a_run_is_listed_with_its_figures(tt):
    listed = {Path(run["path"]).name: run for run in tt("ls", "runs", "--json").json["runs"]}
    old = listed["old"]
    assert (old["best_eval_loss"], old["best_step"]) == (2.0, 1)  # the one before step 1 does not count
    assert (old["step"], old["steps_total"], old["method"], old["model"]) == (2, 4, "lora", "org/Qwen3-0.6B")
    assert old["bytes"] == sum(file.stat().st_size for file in Path("runs/old").iterdir())
    assert listed["new"]["best_eval_loss"] is None
    text = tt("ls", "runs").out
    assert text.splitlines()[0].split() == [
        "PATH", "RECIPE", "METHOD", "BASE", "STATE", "STEP", "HELD-OUT", "LOSS", "SIZE", "CHANGED",
    ]  # fmt: skip
    assert "2.0000 at 1" in text
    assert "2/4" in text
    assert " meta-llama/Llama-3.2-1B-Instruct " in text


@pytest.mark.parametrize(("words", "said"), [
    (["ls", "--sort", "loss"], "--sort is for runs; did you mean tt ls runs --sort ...?"),
    (["ls", "configs", "--recipe", "sft"], "--recipe is for runs"),
    (["ls", "runs", "--recipe", "stf"], "--recipe: no recipe 'stf'; did you mean 'sft'?"),
    (["ls", "runs", "--sort", "lsos"], "did you mean 'loss'?"),
    (["ls", "runs", "--status", "finised"], "did you mean 'finished'?"),
])  # fmt: skip
def test_a_wrong_choice_is_one_line(tt, words, said):
    answer = tt(*words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert said in answer.err


def test_a_choice_that_fits_no_run_is_told(tt):
    answer = tt("ls", "runs", "--status", "failed")
    assert (answer.code, answer.out) == (0, "no such runs here\n")


def test_listing_runs_loads_no_torch(tt_process, tmp_path):
    answer = tt_process("ls", "runs", python=["-X", "importtime"], cwd=tmp_path)
    assert answer.code == 0
    assert "torch._C" not in answer.err


def test_the_states_are_those_of_a_run():
    from tt_cli.verbs.ls import STATES
    from tt_train.run import listing

    assert STATES == listing.STATES


def test_a_file_that_is_missing_is_named_in_words_and_a_run_that_vanishes_is_left_out(tt, caplog, monkeypatch):
    Path("runs/old/metrics.jsonl").unlink()
    assert tt("ls", "runs").code == 0
    assert caplog.messages == ["runs/old/metrics.jsonl: No such file or directory"]
    monkeypatch.setattr("tt_train.run.listing.is_run", lambda path: True)
    (Path("runs") / "gone").mkdir()
    assert names(tt) == ["new", "mid", "old"]


def test_a_folder_of_runs_that_is_a_link_to_itself_has_no_runs(tt, tmp_path, monkeypatch):
    (tmp_path / "loop").mkdir()
    monkeypatch.chdir(tmp_path / "loop")
    Path("runs").symlink_to("runs")
    assert tt("watch").err.startswith(f"error: no run found under {tmp_path}/loop/runs; name one")
