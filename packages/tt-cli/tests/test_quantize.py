"""tt quantize on the command line, and torchtune's names for it."""

import json

import pytest


def test_quantize_prints_one_json_object_with_the_report(tt, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("tt_train.models.quality.NEW_TOKENS", 2)
    said = tt("quantize", str(model_dir), "-o", str(tmp_path / "small"), "--to", "8w", "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert found["ok"]
    assert found["format"] == "int8"
    assert {"layers", "skipped", "bytes_before", "bytes_after", "sqnr_db", "before", "after", "greedy_agreement"} <= (
        found.keys()
    )
    assert "linear layers" in said.err
    answered = tt("generate", str(tmp_path / "small"), "hello", "--max-new-tokens", "2")
    assert answered.code == 0


def test_quantize_lists_what_runs_here(tt):
    rows = {row["format"]: row["runs"] for row in json.loads(tt("quantize", "--list", "--json").out)["formats"]}
    assert rows["int8"]
    assert rows["int4"]
    lines = tt("quantize", "--list").out.splitlines()
    assert len(lines) == len(rows)
    assert all(("does not run here" in line) != rows[line.split()[0]] for line in lines)


@pytest.mark.parametrize("words", [["m", "-o", "out"], ["m", "--to", "int8"], ["-o", "out", "--to", "int8"]])
def test_what_is_missing_is_named(tt, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = tt("quantize", *words)
    assert said.code == 2
    assert said.err.startswith("error: ")


def test_torchtunes_quantization_is_answered_with_our_line(tt, tmp_path):
    line = "a verb here: tt quantize MODEL -o DIR --to int4 --group-size 256"
    for words in (["quantize"], ["quantization"], ["quantize", "--config", "quantization"]):
        assert line in tt("run", *words).err
    changed = ["checkpointer.checkpoint_dir=llama", "quantizer._component_=torchtune.q.Int8WeightOnlyQuantizer"]
    assert "tt quantize llama -o DIR --to int8\n" in tt("run", "quantization", *changed).err
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(
        "model: {_component_: torchtune.models.llama2.llama2_7b}\ncheckpointer: {checkpoint_dir: llama}\n"
        "quantizer: {_component_: torchtune.training.quantization.Int8DynActInt4WeightQuantizer, groupsize: 32}\n"
    )
    said = tt("migrate", str(theirs))
    assert "tt quantize llama -o DIR --to int8-dynamic-int4 --group-size 32" in said.err
