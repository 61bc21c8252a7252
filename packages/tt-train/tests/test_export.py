"""Exports: what is written, and that a Modelfile's template says what the chat template says."""

import json
import re
import shutil

import pytest

import tt_ckpt
import tt_data
from tt_train import ConfigError
from tt_train.models.export import export
from tt_train.models.go_template import ollama_prompt


def test_a_model_goes_out_with_its_commands(model_dir, tmp_path):
    done = export(model_dir, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
    assert done["commands"][0] == f"vllm serve {tmp_path / 'out'}"
    with pytest.raises(ConfigError, match="not empty"):
        export(model_dir, tmp_path / "out")


def test_a_dry_run_writes_nothing(model_dir, tmp_path):
    assert export(model_dir, tmp_path / "out", dry_run=True)["dry_run"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_disk_without_room_for_the_result_is_found_before_a_weight_is_read(model_dir, tmp_path, monkeypatch, dry_run):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(tt_ckpt, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    for to in ("hf", "ollama"):
        with pytest.raises(ConfigError, match=r"out: 1\.0 KB free, the model needs .*; free some or choose another"):
            export(model_dir, tmp_path / "out", to=to, dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_found_before_a_weight_is_read(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tt_ckpt, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for output in ("file", "file/x", "link", "x" * 300, "/proc/out", "a\0b"):
        with pytest.raises(ValueError, match=r"choose another -o|null"):
            export(model_dir, tmp_path / output, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


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
