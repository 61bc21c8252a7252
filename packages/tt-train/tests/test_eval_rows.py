"""Evaluation on rows of one's own, which needs no lm-eval: figures as during training, and metrics of one's own."""

import json
import math

import pytest

from tt_train import ConfigError, compose
from tt_train.evals.models import on_rows
from tt_train.evals.rows import Rows, find_metrics
from tt_train.evals.score import ModelOptions
from tt_train.recipes import sft
from tt_train.records.run_files import read_json


@pytest.fixture(scope="module")
def held_out(rows_file, tmp_path_factory):
    file = tmp_path_factory.mktemp("held") / "held.jsonl"
    file.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:11]))
    return file


@pytest.fixture(scope="module")
def trained(model_dir, held_out, tmp_path_factory):
    """A run that knows some of its rows by heart."""
    options = [f"model.path={model_dir}", f"data.train={held_out}", f"data.eval={held_out}", "model.dtype=fp32",
               "batch_size=8", "micro_batch_size=8", "max_steps=60", "optimizer.lr=2e-2", "device=cpu",
               "samples.exact_match=11", f"output_dir={tmp_path_factory.mktemp('trained') / 'run'}"]  # fmt: skip
    return sft.main(compose("sft", overrides=options))


def run(models, rows, told=None, **options):
    told = [] if told is None else told
    return on_rows([str(model) for model in models], rows, ModelOptions(device="cpu", **options), tell=told.append,
                   tell_rows=told.extend)  # fmt: skip


def figures(report):
    return {figure.metric: figure.value for figure in report.figures}


def test_loss_and_exact_match_are_those_of_the_last_evaluation_in_training(trained, held_out, model_dir):
    own, base = run([trained, model_dir], Rows(source=str(held_out)))
    summary = read_json(trained / "manifest.json")["summary"]
    found = figures(own)
    assert found["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]), rel=1e-5)
    assert found["exact_match"] == summary["eval_exact_match"] > 0
    assert figures(base)["loss"] > found["loss"]
    assert len(own.samples) == 11
    right = [row["answer"].strip() == row["expected"].strip() for row in own.samples]
    assert sum(right) / 11 == found["exact_match"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_do_not_depend_on_the_size_of_a_batch(model_dir, held_out, batch_size):
    """A mean of batch means would."""
    [one] = run([model_dir], Rows(source=str(held_out), limit=7))
    [other] = run([model_dir], Rows(source=str(held_out), limit=7), batch_size=batch_size)
    assert figures(one) == pytest.approx(figures(other), rel=1e-5)
    assert [row["answer"] for row in one.samples] == [row["answer"] for row in other.samples]
    assert {figure.rows for figure in one.figures} == {7}


def test_a_metric_of_ones_own_gets_prompts_answers_and_expected_texts(model_dir, held_out, tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(
        "def lengths(prompts, answers, expected):\n"
        "    return {'prompts': len(prompts), 'expected_words': sum(len(text.split()) for text in expected)}\n"
        "def wrong(prompts, answers, expected):\n    return 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="add --allow-import my_metrics"):
        find_metrics(["my_metrics:lengths"], [])
    with pytest.raises(ConfigError, match="expected module:function, got 'my_metrics.lengths'"):
        find_metrics(["my_metrics.lengths"], ["my_metrics"])
    with pytest.raises(ConfigError, match="did you mean 'lengths'"):
        find_metrics(["my_metrics:length"], ["my_metrics"])
    metrics = find_metrics(["my_metrics:lengths"], ["my_metrics"])
    [report] = run([model_dir], Rows(source=str(held_out), metrics=metrics, max_new_tokens=4))
    words = sum(len(json.loads(line)["messages"][1]["content"].split()) for line in held_out.read_text().splitlines())
    assert figures(report)["prompts"] == 11
    assert figures(report)["expected_words"] == words
    with pytest.raises(ConfigError, match="must return finite numbers by name"):
        run([model_dir], Rows(source=str(held_out), metrics=find_metrics(["my_metrics:wrong"], ["my_metrics"])))


def test_rows_that_compare_answers_are_refused(model_dir, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="rows compare answers; give rows of one answer each"):
        run([model_dir], Rows(source=str(tmp_path / "pairs.jsonl")))


def test_rows_without_prompts_have_a_loss_and_no_exact_match_and_that_is_told(model_dir, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "alpha beta gamma"}\n{"text": "delta"}\n')
    told = []
    [report] = run([model_dir], Rows(source=str(tmp_path / "texts.jsonl")), told)
    assert figures(report).keys() == {"loss", "perplexity"}
    assert any("exact match: 0 of 2 rows can be asked" in line for line in told)


def _on_a_rank(model_dir, held_out, expected):
    from tt_train.devices.distributed import world

    found = run([model_dir], Rows(source=str(held_out)))
    if world().is_main:
        assert figures(found[0]) == pytest.approx(expected, rel=1e-5)
    else:
        assert found == []


def test_two_ranks_give_what_one_process_gives(model_dir, held_out, ranks):
    [one] = run([model_dir], Rows(source=str(held_out)))
    ranks(2, _on_a_rank, model_dir, held_out, figures(one))
