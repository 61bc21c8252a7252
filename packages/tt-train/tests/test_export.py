"""Exports: what is written, and that a Modelfile's template says what the chat template says."""

import json
import re

import pytest

import tt_data
from tt_train import ConfigError
from tt_train.export import export, go_template, ollama_modelfile


def fill(template, *, system, prompt, response):
    """What Go's text/template makes of the few constructs that we write."""
    for name, value in {"System": system, "Prompt": prompt}.items():
        pattern = re.compile(r"{{ if \.NAME }}(.*?){{ end }}".replace("NAME", name), re.DOTALL)
        template = pattern.sub(lambda m, value=value: m.group(1) if value else "", template)
    words = {".System": system, ".Prompt": prompt, ".Response": response}
    return re.sub(r"{{ (\.\w+) }}", lambda m: words[m.group(1)], template)


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
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    assert fill(template, system="S", prompt="U", response="A") == tokenizer.render(turns)
    assert fill(template, system="", prompt="U", response="A") == tokenizer.render(turns[1:])


def test_a_template_that_folds_the_system_text_into_the_turn_keeps_the_turn(model_dir):
    tokenizer = tt_data.load_tokenizer(model_dir)
    folded = tokenizer.with_template({"default": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}, "folded")
    assert fill(go_template(folded), system="", prompt="U", response="A]").startswith("[U]")


def test_a_template_that_rewrites_turns_is_refused(model_dir):
    tokenizer = tt_data.load_tokenizer(model_dir)
    odd = tokenizer.with_template({"default": "{{ messages | length }}{{ messages[0].content }}"}, "odd")
    with pytest.raises(ConfigError, match="no plain sequence"):
        ollama_modelfile(odd)


def test_an_unknown_format_suggests(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'ollama'"):
        export(model_dir, tmp_path / "out", to="olama")
    assert json.loads((model_dir / "config.json").read_text())["model_type"] == "llama"
