"""Exports: what is written, and that a Modelfile's template says what the chat template says."""

import json
import re

import pytest

import tt_data
from tt_train import ConfigError
from tt_train.export import export
from tt_train.go_template import ollama_prompt


def test_a_model_goes_out_with_its_commands(model_dir, tmp_path):
    done = export(model_dir, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
    assert done["commands"][0] == f"vllm serve {tmp_path / 'out'}"
    with pytest.raises(ConfigError, match="not empty"):
        export(model_dir, tmp_path / "out")


def test_a_dry_run_writes_nothing(model_dir, tmp_path):
    assert export(model_dir, tmp_path / "out", dry_run=True)["dry_run"]
    assert not (tmp_path / "out").exists()


def test_the_modelfile_renders_as_the_model_does(model_dir, tmp_path):
    tokenizer = tt_data.load_tokenizer(model_dir)
    export(model_dir, tmp_path / "out", to="ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM .\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    template = re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)[1]
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    for messages in (turns, turns[1:]):
        assert ollama_prompt(template, messages) == tokenizer.render(messages, add_generation_prompt=True)


def test_an_unknown_format_suggests(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'ollama'"):
        export(model_dir, tmp_path / "out", to="olama")
    assert json.loads((model_dir / "config.json").read_text())["model_type"] == "llama"
