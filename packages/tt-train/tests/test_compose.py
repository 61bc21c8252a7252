"""Configs: what is accepted, and how each mistake is answered."""

import time
from pathlib import Path

import pytest

from tt_train import ConfigError, compose
from tt_train.config import SFTConfig, to_dict, to_yaml

BASE = ["model.path=DIR", "data.train=rows.jsonl"]


def problems(*words, **kwargs):
    with pytest.raises(ConfigError) as caught:
        compose(kwargs.pop("recipe", "sft"), overrides=[*BASE, *words], **kwargs)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_defaults_come_from_the_dataclass():
    config = compose("sft", overrides=BASE)
    assert config.batch_size == SFTConfig().batch_size
    assert config.adapter is None


def test_what_only_a_run_needs_may_be_left_out_to_look_at_a_config():
    assert compose("sft", complete=False).model.path is None
    with pytest.raises(ConfigError, match="model.path: missing") as caught:
        compose("sft")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="batch_size"):
        compose("sft", overrides=["batch_size=0"], complete=False)


def test_an_override_switches_the_adapter_on_and_null_switches_it_off(tmp_path):
    assert compose("sft", overrides=[*BASE, "adapter.rank=4"]).adapter.rank == 4
    file = tmp_path / "lora.yaml"
    file.write_text(
        "recipe: sft\nmodel: {path: DIR}\nadapter:\n  rank: 4\n  target_modules: all-linear\ndata: {train: a}\n"
    )
    config = compose(file)
    assert config.adapter.rank == 4
    assert config.adapter.target_modules == "all-linear"
    assert compose(file, overrides=["adapter=null"]).adapter is None
    assert compose("sft", config=file, overrides=["adapter.rank=16"]).adapter.rank == 16


def test_values_are_yaml_split_at_the_first_equals_sign():
    config = compose(
        "sft",
        overrides=[
            "model.path=a=b",
            "data.train=[x.jsonl, y.jsonl]",
            "optimizer.lr=2e-5",
            "data.columns.messages=conv",
            "max_grad_norm=null",
        ],
    )
    assert config.model.path == "a=b"
    assert config.data.train == ["x.jsonl", "y.jsonl"]
    assert config.optimizer.lr == 2e-5
    assert config.data.columns == {"messages": "conv"}
    assert config.max_grad_norm is None


def test_a_mixture_keeps_its_file_names(tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text("model: {path: DIR}\ndata:\n  train: {a.jsonl: 0.7, b.parquet: 0.3}\nrecipe: sft\n")
    assert compose(file).data.train == {"a.jsonl": 0.7, "b.parquet": 0.3}


def test_a_config_survives_yaml(tmp_path):
    config = compose("sft", overrides=[*BASE, "adapter.rank=4", "optimizer.betas=[0.8, 0.9]", "seed=3"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert to_dict(compose(tmp_path / "again.yaml")) == to_dict(config)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("adapter.rnk=8", "did you mean 'adapter.rank'?"),
        ("learning_rate=1", "did you mean 'optimizer.lr'?"),
        ("lr=1e-4", "did you mean 'optimizer.lr'?"),
        ("rank=4", "did you mean 'adapter.rank'?"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got the text 'fast'"),
        ("batch_size=4.5", "batch_size: expected a whole number, got 4.5"),
        ("batch_size=null", "batch_size: expected a whole number, got None"),
        ("adapter=8", "adapter: expected keys (rank, "),
        ("data.packing=maybe", "data.packing: expected true or false"),
        ("batch_size.x=1", "batch_size has no keys inside"),
        ("model.dtype=bf61", "did you mean 'bf16'?"),
        ("model.dtype=fp16", "fp16 overflows"),
        ("batch_size=10 micro_batch_size=4", "nearest that do: 8 or 12"),
        ("adapter.rank=0", "adapter.rank: must be at least 1, got 0"),
        ("adapter.dropout=1.0", "adapter.dropout: must be at least 0 and below 1, got 1.0"),
        ("optimizer.name=adamv", "did you mean 'adam'?"),
        ("loss.name=os.system", "--allow-import os"),
        ("model.path=${oc.env:HF_TOKEN}", "interpolation"),
        ("--lr", "expected key=value"),
        ("adapter", "expected key=value"),
    ],
)
def test_a_mistake_is_named_with_its_cure(word, expected):
    assert any(expected in problem for problem in problems(*word.split(" ")))


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("model:\n  path: DIR\nbatchsize: 4\nadapter:\n  rnk: 3\ndata: {train: x}\n")
    found = problems(recipe="sft", config=file)
    assert any(problem.startswith(f"{file}:3: batchsize: unknown key; did you mean 'batch_size'") for problem in found)
    assert any(problem.startswith(f"{file}:5: adapter.rnk: ") for problem in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", ":1: not YAML"),
        ("a: &x [1]\nb: *x\n", ":2: not YAML: aliases"),
        ("x: !!python/object/apply:os.system [true]\n", "x: "),
        ("- 1\n", "expected keys and values"),
        ("seed: 1\nseed: 2\n", "stands twice"),
        ("_component_: os.system\n", "unknown key"),
    ],
)
def test_a_hostile_or_broken_file_is_refused(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert any(expected in problem for problem in problems(recipe="sft", config=file))


def test_unknown_names_suggest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'sft'?" in problems(recipe="stf")[0]
    Path("lora.yaml").write_text("")
    assert "did you mean 'lora.yaml'?" in problems(recipe="lorra.yaml")[0]


def test_a_dotted_name_is_imported_only_where_allowed(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def focal(model, batch): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = compose("sft", overrides=[*BASE, "loss.name=mine.focal"], allow_import=["mine"])
    assert config.loss.name == "mine.focal"
    assert "cannot be imported" in problems("loss.name=mine.local", allow_import=["mine"])[0]


def test_key_typos_are_recognised_in_95_percent():
    from tt_train.composing import _all_keys, _unknown_key

    keys = [key for key in _all_keys(SFTConfig) if len(key.rsplit(".", 1)[-1]) > 3]
    hit = total = 0
    for key in keys:
        head, dot, last = key.rpartition(".")
        for place in range(len(last)):
            typo = last[:place] + last[place + 1 :]
            total += 1
            hit += f"{key!r}" in _unknown_key(SFTConfig, head + dot + typo)
    assert hit / total >= 0.95


def test_composing_takes_a_moment():
    compose("sft", overrides=BASE)
    start = time.perf_counter()
    compose("sft", overrides=[*BASE, "adapter.rank=4", "seed=1"])
    assert time.perf_counter() - start < 1
