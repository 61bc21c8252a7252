"""``tt ls runs``: order, choice and figures."""

import json
import os
from pathlib import Path

import pytest

from tt_train.records import run_files
from tt_train.run.dir import find_run
from tt_train.run.listing import list_runs


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


def evaluate(run: Path, stamp: str, *figures: tuple[str, str, float]) -> None:
    (run / "evals").mkdir(exist_ok=True)
    rows = [{"task": task, "metric": metric, "filter": "none", "value": value} for task, metric, value in figures]
    (run / "evals" / f"{stamp}-results.json").write_text(json.dumps({"results": rows}))


def test_a_run_is_listed_with_the_first_figure_of_its_newest_evaluation(tt):
    assert "TT EVAL" not in tt("ls", "runs").out
    evaluate(Path("runs/old"), "20260101-000000", ("piqa", "acc", 0.5))
    evaluate(Path("runs/old"), "20260102-000000", ("arc_easy", "acc", 0.25), ("arc_easy", "acc_norm", 0.375))
    answer = tt("ls", "runs")
    assert "TT EVAL" in answer.out.splitlines()[0]
    (line,) = (line for line in answer.out.splitlines() if "old" in line)
    assert "arc_easy acc 0.2500 +1" in line
    listed = {Path(run["path"]).name: run["evaluation"] for run in tt("ls", "runs", "--json").json["runs"]}
    assert [figure["metric"] for figure in listed["old"]] == ["acc", "acc_norm"]
    assert listed["new"] == []


def test_a_broken_evaluation_is_told_and_its_run_is_listed(tt, caplog):
    evaluate(Path("runs/old"), "20260101-000000")
    (Path("runs/old/evals") / "20260101-000000-results.json").write_text("{")
    assert names(tt) == ["new", "mid", "old"]
    assert "runs/old: evals/20260101-000000-results.json: left out" in caplog.messages[0]


def test_a_long_run_is_listed_with_few_of_its_rows_parsed(monkeypatch):
    """200,000 rows: the end and the evaluations are parsed; of a finished run, none."""
    steps = 200_000
    lines = [json.dumps({"step": step, "loss": 2.0 + step % 2, "tokens": step, "epoch": 0.1})
             for step in range(1, steps + 1)]  # fmt: skip
    lines[999], lines[-2] = json.dumps(row(1000, 2.0, 0.25)), json.dumps(row(steps - 1, 3.0, 0.5))
    text = "\n".join(lines) + "\n"
    for name, more in {"long": {"state": "stopped"}, "done": {"summary": {"steps": steps, "loss_last": 1.5}}}.items():
        (make(name, when=4000, rows=[], **more) / "metrics.jsonl").write_text(text)
    parsed = []
    monkeypatch.setattr(run_files, "is_plain", lambda value: not parsed.append(value))
    listed = {Path(run["path"]).name: run for run in list_runs()}
    assert {key: listed["long"][key] for key in ("step", "best_eval_loss", "best_step")} == {
        "step": steps, "best_eval_loss": 0.25, "best_step": 1000,
    }  # fmt: skip
    assert listed["long"]["loss"] == pytest.approx(2.5, abs=0.01)
    assert (listed["done"]["step"], listed["done"]["loss"]) == (steps, 1.5)
    assert len(parsed) < steps / 10
    parsed.clear()
    assert find_run().name in ("long", "done")
    assert not parsed


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
    assert caplog.messages == ["runs/old/metrics.jsonl: no such file"]
    monkeypatch.setattr("tt_train.run.listing.is_run", lambda path: True)
    (Path("runs") / "gone").mkdir()
    assert names(tt) == ["new", "mid", "old"]


def test_a_folder_of_runs_that_is_a_link_to_itself_has_no_runs(tt, tmp_path, monkeypatch):
    (tmp_path / "loop").mkdir()
    monkeypatch.chdir(tmp_path / "loop")
    Path("runs").symlink_to("runs")
    assert tt("watch").err.startswith(f"error: no run found under {tmp_path}/loop/runs; name one")
