"""``tt eval``: tables and JSON of runs and models, on local tasks and on rows; wrong use is told at once."""

import json
import os

import pytest

KEYS = {"model", "task", "metric", "value", "stderr", "filter", "version", "num_fewshot", "rows", "higher_is_better"}


@pytest.fixture
def tasks(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"q": f"Repeat the word {word}.", "c": [word, "none"], "a": 0} for word in ("red", "blue", "green")]
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "made.yaml").write_text(
        f"task: made\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/made.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_choice: c\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\nmetadata: {version: 3}\n"
    )
    return tmp_path


@pytest.fixture
def held_out(tmp_path):
    row = {"messages": [{"role": "user", "content": "Repeat red."}, {"role": "assistant", "content": "red"}]}
    (tmp_path / "held.jsonl").write_text(json.dumps(row) + "\n")
    return str(tmp_path / "held.jsonl")


def test_a_run_and_its_base_are_side_by_side_and_the_run_keeps_the_file(tt, lora_run, model_dir, tasks):
    words = [str(lora_run), str(model_dir), "--tasks", "made", "--include-path", str(tasks), "--device", "cpu"]
    answer = tt("eval", *words)
    assert answer.code == 0, answer.err
    head, line = answer.out.splitlines()
    assert head.split() == ["task", "version", "n-shot", "rows", "metric", str(lora_run), str(model_dir)]
    assert line.split()[:5] == ["made", "3", "0", "3", "acc"]
    [file] = answer.err.splitlines()
    saved = json.loads((lora_run / file.partition(f"{lora_run.name}/")[2]).read_text())
    assert set(saved["results"][0]) == KEYS
    assert saved["results"][0]["version"] == 3


def test_rows_of_ones_own_need_no_harness_and_answer_in_json(tt, model_dir, held_out, tmp_path):
    answer = tt("eval", str(model_dir), "--data", held_out, "--json", "-o", str(tmp_path / "r.json"), "--log-samples")
    assert answer.code == 0, answer.err
    assert answer.json["ok"]
    assert [row["metric"] for row in answer.json["results"]] == ["loss", "perplexity", "exact_match"]
    assert all(set(row) == KEYS for row in answer.json["results"])
    assert answer.json["files"] == [str(tmp_path / "r.json"), str(tmp_path / "r.samples.jsonl")]
    assert json.loads((tmp_path / "r.samples.jsonl").read_text())["expected"] == "red"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --tasks NAMES or --data ROWS"),
        (["--tasks", "a", "--data", "b"], "give either --tasks NAMES or --data ROWS"),
        (["--tasks", "a", "--metric", "m:f"], "--metric is for --data; leave it out"),
        (["--data", "a", "--num-fewshot", "2"], "--num-fewshot is for --tasks; leave it out"),
        (["--data", "a", "--limit", "0.5"], "--limit: with --data a whole number of rows"),
        (["--data", "a", "-o", "."], "-o: . is a folder; name a file in it"),
        (["--data", "a", "-o", __file__], "test_eval.py: already there; remove it, or name another file"),
        (["--data", "a", "-o", "no-such/r.json"], "no-such: no such folder for the results; make it, or choose"),
        (["--data", "no-such.jsonl"], "no-such.jsonl"),
        (
            ["--data", "a", "--metric", "m:f"],
            "--metric: 'm.f' is code of yours; to let it be imported, add --allow-import m",
        ),
    ],
)
def test_wrong_use_is_told_in_a_line(tt, model_dir, words, message, monkeypatch):
    monkeypatch.setattr("tt_train.evals.score.load", lambda *_, **__: pytest.fail("weights were loaded"))
    answer = tt("eval", str(model_dir), *words)
    assert answer.code == 2
    [line] = answer.err.splitlines()
    assert message in line


def test_a_run_that_cannot_be_written_is_told_before_weights_load(tt, lora_run, held_out, monkeypatch):
    monkeypatch.setattr("tt_train.evals.score.load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr("os.access", lambda path, mode: not (mode & os.W_OK and str(lora_run) in str(path)))
    answer = tt("eval", str(lora_run), "--data", held_out)
    assert answer.code == 2
    assert "the results cannot be written here; name a file elsewhere with -o" in answer.err


def test_torchtunes_evaluation_is_answered_with_the_line_that_does_it(tt):
    answer = tt("run", "eleuther_eval", "--config", "eleuther_evaluation", "tasks=[arc_easy,mmlu]", "limit=3")
    assert answer.code == 2
    assert "tt eval MODEL --tasks arc_easy,mmlu --limit 3 --batch-size 32 --max-length 4096 --seed 217" in answer.err
