"""A run that brings its own chat template: who gets the weights gets the template, and the tokens that end a turn."""

import json
import shutil

import pytest

import tt_data
import tt_train
from tt_train.models import merge
from tt_train.models.export import export
from tt_train.models.merge import merge_run
from tt_train.recipes import sft
from tt_train.records.run_files import FinishedRun
from tt_train.run.serving import from_record
from tt_train.settings.composing import compose

TURNS = [{"role": "user", "content": "say alpha"}, {"role": "assistant", "content": "alpha"}]
MINE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory, model_dir):
    """A base model: no chat template, and its text ends with another token than a turn does."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": None, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
    return folder


@pytest.fixture(scope="module")
def runs(plain_model, rows_file, tmp_path_factory):
    """A full run and a LoRA run with a template file that is gone afterwards."""
    root = tmp_path_factory.mktemp("runs")
    template = root / "mine.jinja"
    template.write_text(MINE)
    words = [f"model.path={plain_model}", f"data.train={rows_file}", f"data.template={template}", "model.dtype=fp32"]
    words += ["batch_size=4", "micro_batch_size=4", "max_steps=1", "device=cpu", "samples.max_new_tokens=1"]
    made = {
        "full": sft.main(compose("sft", overrides=[*words, f"output_dir={root / 'full'}"])),
        "lora": sft.main(compose("sft", overrides=[*words, "adapter.rank=2", f"output_dir={root / 'lora'}"])),
    }
    template.unlink()
    return made


def served(folder):
    """How transformers renders a prompt from ``folder``, and where it stops."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    return text, transformers.GenerationConfig.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_is_asked_with_its_template(runs, kind):
    _, tokenizer = tt_train.load(runs[kind])
    assert tokenizer.render(TURNS) == "<|im_start|>user:say alpha<|im_end|><|im_start|>assistant:alpha<|im_end|>"
    assert tokenizer.token_id("<|im_end|>") in tokenizer.eos_ids


def test_the_template_of_a_run_goes_where_its_adapter_goes(runs, tmp_path):
    shutil.copytree(runs["lora"] / "adapter", tmp_path / "elsewhere")
    assert tt_train.load(tmp_path / "elsewhere")[1].render(TURNS) == tt_train.load(runs["lora"])[1].render(TURNS)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_merged_or_exported_carries_template_and_ends(runs, kind, tmp_path):
    if kind == "full":
        folder = runs["full"] / "model"
    else:
        folder = merge_run(runs["lora"], tmp_path / "merged")
    text, generation = served(folder)
    assert text == "<|im_start|>user:say alpha<|im_end|><|im_start|>assistant:"
    assert generation.eos_token_id == [0, 2]
    assert generation.temperature == 0.5
    assert tt_data.load_tokenizer(folder).render(TURNS) == tt_train.load(runs[kind])[1].render(TURNS)


def test_the_modelfile_has_the_template_of_the_run(runs, tmp_path):
    export(runs["lora"], tmp_path / "out", to="ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "<|im_start|>user:{{ .Prompt }}<|im_end|>" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_a_model_keeps_its_own_files_where_the_run_brought_none(model_dir, tmp_path):
    folder = merge_run(model_dir, tmp_path / "merged")
    assert not (folder / "chat_template.jinja").exists()
    assert (folder / "generation_config.json").read_bytes() == (model_dir / "generation_config.json").read_bytes()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_of_its_own_goes_out_with_the_run(model_dir, tokenizer_dir, rows_file, tmp_path, place):
    mine = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, mine)
    config = json.loads((mine / "tokenizer_config.json").read_text())
    if place == "chat_template.jinja":
        (mine / place).write_text(MINE)
    else:
        (mine / place).write_text(json.dumps(config | {"chat_template": MINE}))
    words = [f"model.path={model_dir}", f"model.tokenizer={mine}", f"data.train={rows_file}", "model.dtype=fp32"]
    words += ["batch_size=4", "micro_batch_size=4", "max_steps=1", "device=cpu", "samples.max_new_tokens=1"]
    run = sft.main(compose("sft", overrides=[*words, "adapter.rank=2", f"output_dir={tmp_path / 'run'}"]))
    assert (
        served(merge_run(run, tmp_path / "merged"))[0] == "<|im_start|>user:say alpha<|im_end|><|im_start|>assistant:"
    )
    assert FinishedRun(run).manifest["serving"] is None  # files of another folder are copied from there


# ---- the record of a run ---------------------------------------------------------------------------------------------


def with_record(run, folder, change):
    """A copy of the run whose record in the manifest is what ``change`` makes of it."""
    shutil.copytree(run, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["serving"] = change(manifest["serving"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def own_ends(model_dir, rows_file, tmp_path_factory):
    """A LoRA run with the template of its base."""
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "adapter.rank=2", "batch_size=4"]
    words += ["micro_batch_size=4", "max_steps=1", "device=cpu", "samples.num=0"]
    return sft.main(compose("sft", overrides=[*words, f"output_dir={tmp_path_factory.mktemp('own') / 'run'}"]))


@pytest.mark.parametrize("kind", ["a template file", "that of the base"])
def test_a_merge_by_the_record_of_the_run_writes_what_its_tokenizer_would_give(
    runs, own_ends, tmp_path, monkeypatch, kind
):
    run = runs["lora"] if kind == "a template file" else own_ends
    loaded = merge_run(with_record(run, tmp_path / "run", lambda _: None), tmp_path / "loaded")
    monkeypatch.setattr(merge, "load_tokenizer", lambda _: pytest.fail("the tokenizer was loaded"))
    recorded = merge_run(run, tmp_path / "recorded")
    assert sorted(path.name for path in loaded.iterdir()) == sorted(path.name for path in recorded.iterdir())
    assert all(path.read_bytes() == (recorded / path.name).read_bytes() for path in loaded.iterdir())


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
def test_a_record_ends_with_the_files_that_it_was_made_of(runs, plain_model, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(plain_model, base)
    run = FinishedRun(runs["lora"])
    assert from_record(run.manifest["serving"], [run.path, run.path / "adapter", base]) is not None
    (base / name).write_text((base / name).read_text() + " ")
    assert from_record(run.manifest["serving"], [run.path, run.path / "adapter", base]) is None
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.25}))
    folder = merge_run(run.path, tmp_path / "merged", base=str(base))
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.25


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"files": {"config.json": "{}"}},
        lambda record: record | {"files": {"model.safetensors": ""}},
        lambda record: record | {"files": {"../chat_template.jinja": ""}},
        lambda record: record | {"files": {"generation_config.json": ["x"]}},
        lambda record: record | {"files": None},
        lambda record: record | {"vocab_size": None},
        lambda record: record | {"digest": ""},
        lambda record: {"digest": record["digest"]},
        lambda record: {},
    ],
)
def test_a_record_that_no_run_writes_is_left_aside(own_ends, tmp_path, change):
    folder = merge_run(with_record(own_ends, tmp_path / "run", change), tmp_path / "merged")
    whole = merge_run(own_ends, tmp_path / "whole")
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in whole.iterdir())
