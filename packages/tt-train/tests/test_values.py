"""Values as people type them: in a YAML file and on the command line alike, read as meant or refused with a cure."""

import os
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tt_train import ConfigError, compose
from tt_train.config import RunConfig, to_dict

# text -> what a key of whole numbers, of numbers, and of truth values makes of it; ...: refused
NUMBERS = [
    ("0123", 123, 123.0, ...), ("007", 7, 7.0, ...), ("1_000", 1000, 1000.0, ...), ("1e5", 100_000, 1e5, ...),
    ("1E-4", ..., 1e-4, ...), (".5", ..., 0.5, ...), ("5.", 5, 5.0, ...), ("+1", 1, 1.0, ...), ("8 ", 8, 8.0, ...),
    ("'8 '", 8, 8.0, ...), ('"1e3"', 1000, 1000.0, ...), ("1.5e3", 1500, 1500.0, ...),
    ("0o17", ..., ..., ...), ("0x10", ..., ..., ...), ("0b11", ..., ..., ...), ("1:30", ..., ..., ...),
    ("1__0", ..., ..., ...), ("1_", ..., ..., ...), ("_1", ..., ..., ...), ("1,000", ..., ..., ...),
    ("2026-01-01", ..., ..., ...), ("10%", ..., ..., ...), ("5k", ..., ..., ...), ("1/2", ..., ..., ...),
    ("None", ..., ..., ...), ("1e999", ..., ..., ...), ("1e-999", ..., ..., ...), (".inf", ..., ..., ...),
    ("-.inf", ..., ..., ...), (".nan", ..., ..., ...), ("NaN", ..., ..., ...), ("9" * 500, ..., ..., ...),
    ("9" * 5000, ..., ..., ...), ("\u0661\u0662", ..., ..., ...), ("\u00bd", ..., ..., ...),
    ("yes", ..., ..., True), ("no", ..., ..., False), ("on", ..., ..., True), ("Off", ..., ..., False),
    ("TRUE", ..., ..., True), ("1", 1, 1.0, True), ("y", ..., ..., ...), ("2", 2, 2.0, ...),
]  # fmt: skip
KEYS = ("batch_size", "optimizer.weight_decay", "data.packing")
CASES = [
    pytest.param(key, text, row[place], id=f"{key}={text[:12]}")
    for text, *row in NUMBERS
    for place, key in enumerate(KEYS)
]


def value_of(config, key):
    plain = to_dict(config)
    for part in key.split("."):
        plain = plain[part]
    return plain


@pytest.mark.parametrize("where", ["file", "word"])
@pytest.mark.parametrize(("key", "text", "meant"), CASES)
def test_a_number_is_what_a_person_reads_or_is_refused(tmp_path, where, key, text, meant):
    words, file = [f"{key}={text}"], None
    if where == "file":
        *sections, last = key.split(".")
        file, words = tmp_path / "c.yaml", []
        file.write_text("".join(f"{name}:\n  " for name in sections) + f"{last}: {text}\n", encoding="utf-8")
    if meant is not ...:
        found = value_of(compose("sft", config=file, overrides=[*words, "micro_batch_size=1"], complete=False), key)
        assert (found, type(found)) == (meant, type(meant))
        return
    with pytest.raises(ConfigError) as caught:
        compose("sft", config=file, overrides=[*words, "micro_batch_size=1"], complete=False)
    (problem,) = caught.value.problems
    assert key in problem
    assert problem.isprintable()
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("batch_size=0x10", "write 16"), ("batch_size=0o17", "write 15"), ("batch_size=1,000", "write 1000"),
        ("batch_size=1 000", "write 1000"), ("batch_size=5k", "write 5000"), ("optimizer.lr=1,5", "write 1.5"),
        ("optimizer.weight_decay=10%", "write 0.1"), ("max_steps=None", "write null"), ("seed=abc", "the default is 0"),
        ("batch_size=null", "the default is 16"), ("loggers=wandb", "write [wandb]"),
        ("max_grad_norm=big", "the default is 1.0"), ("max_steps=many", "write a decimal number, or leave it out"),
        ("optimizer.betas=[0.9]", "the default is [0.9, 0.999]"), ("adapter={rank: 8, rank: 4}", "is given twice"),
        ("data.columns={a: b, a: c}", "'a' is given twice; keep one"), ("batch_size:8", "write batch_size=8"),
    ],
)  # fmt: skip
def test_a_refused_value_comes_with_what_to_write(word, cure):
    with pytest.raises(ConfigError) as caught:
        compose("sft", overrides=[word], complete=False)
    assert cure in "\n".join(caught.value.problems)


class Level(Enum):
    low = 1
    high = 2


@dataclass
class Own(RunConfig):
    """Keys of a recipe of one's own, of every kind."""

    counts: list[int] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    pair: tuple[int, float] = (1, 2.0)
    level: Level = Level.low
    place: Path = Path("x")
    either: int | str = 1
    anything: Any = None


@pytest.mark.parametrize(
    ("key", "text", "meant"),
    [
        ("counts", "[010, 1e2, '7']", [10, 100, 7]),
        ("counts", "[1:30]", ...),
        ("shares", "{a: 007, b: 1E-1}", {"a": 7, "b": 0.1}),
        ("shares", "{a: 1:30}", ...),
        ("pair", "[010, 0.5]", (10, 0.5)),
        ("pair", "[1, 2, 3]", ...),
        ("level", "high", Level.high),
        ("level", "medium", ...),
        ("place", "007", Path("007")),
        ("place", "no", Path("no")),
        ("either", "0123", 123),
        ("either", "1:30", "1:30"),
        ("either", "2026-01-01", "2026-01-01"),
        ("anything", "0123", 123),
        ("anything", "1:30", "1:30"),
        ("anything", "2026-01-01", "2026-01-01"),
        ("anything", "{a: [yes, 1_0, ~]}", {"a": ["yes", 10, None]}),
    ],
)
@pytest.mark.parametrize("where", ["file", "word"])
def test_keys_of_a_recipe_of_ones_own_are_read_alike(tmp_path, where, key, text, meant):
    words, file = [f"{key}={text}"], None
    if where == "file":
        file, words = tmp_path / "c.yaml", []
        file.write_text(f"{key}: {text}\n")
    options = {"config": file, "overrides": words, "schema": Own, "complete": False}
    if meant is ...:
        with pytest.raises(ConfigError, match=key):
            compose("sft", **options)
    else:
        found = getattr(compose("sft", **options), key)
        found = tuple(found) if key == "pair" else found
        assert found == meant
        assert typing.cast(Any, type(found)) is type(meant)


FILES = {
    "a tab": ("model:\n\tpath: x\n", ":2:1: not YAML: a tab where YAML wants spaces; indent with spaces"),
    "two documents": ("seed: 1\n---\nseed: 2\n", ":2:1: not YAML: a second document begins here"),
    "a bomb": ("a: &a [x, x]\nb: [*a, *a]\n", ":2:5: aliases (*a) are not read"),
    "a tag": ("seed: !!int '3'\n", ":1:7: tags (!!int) are not read"),
    "a python tag": ("model: !!python/name:os.system\n", ":1:8: tags (!!python/name:os.system) are not read"),
    "100,000 levels": ("a: " + "[" * 100_000, ":1:35: nested too deeply"),
    "100,000 keys of keys": ("? " * 100_000, ":1:65: nested too deeply"),
    "a list as a key": ("? [a, b]\n: 3\n", ":1:3: a key must be a plain word"),
    "a name twice": ("data:\n  columns: {a: b, a: c}\n", ":2:19: data.columns: 'a' is given twice"),
    "a merge in names": ("data:\n  columns:\n    <<: {a: b}\n", ":3:5: data.columns: merge keys (<<) are not read"),
    "a control character": ("a\x07: 1\n", ":1:2: the control character U+0007"),
    "an escape in a key": ('"a\\x1b[31m": 1\n', r":1: a\x1b[31m: unknown key"),
    "an escape of no character": ('"\\UFFFFFFFF": 1\n', "an escape in double quotes"),
    "a pattern": ("data:\n  train: *.jsonl\n", ":2:11: not YAML: a value cannot begin with *; put the value in quotes"),
    "an open quote": ("seed: 'abc\n", "a quote that is not closed"),
    "a backslash": ('model: {path: "C:\\data"}\n', "use single quotes"),
    "bad indentation": ("model:\n   path: a\n  name: b\n", ":3:3: not YAML: the line does not fit the lines above it"),
    "another version": ("%YAML 9.9\n---\nseed: 1\n", "a directive (%YAML) of another version"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n", "git lfs pull"),
    "a web page": ("\n<!DOCTYPE html><html>", "a web page"),
    "a JSON list": ("[1, 2]", ":1: a config is keys and values"),
    "a text": ("hello", ":1: a config is keys and values"),
    "nothing": ("", "empty; a config has keys and values"),
    "10,000 unknown keys": ("".join(f"key{i}: 1\n" for i in range(10_000)), "correct these first"),
    "a key of 200,000 letters": ('"' + "x" * 200_000 + '": 1\n', "the line"),
    "a recipe that is a list": ("recipe: [a]\n", ":1: recipe: expected text"),
    "a hash that is a mapping": ("recipe_sha256: {a: b}\n", ":1: recipe_sha256: expected text"),
    "a name that is a value to come": ("loggers: ['???']\n", "interpolation"),
    "the environment in a name": ("data: {columns: {'${oc.env:HOME}': a}}\n", "interpolation"),
    "names of Python": ("__class__: x\nmodel: {__dict__: 1}\n", "__class__: unknown key"),
    "a flag to run code": ("trust_remote_code: true\n", "code of a model repository never runs"),
    "an opt-in to import": ("allow_import: [os]\n", "allow_import: unknown key"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_a_config_is_refused_with_the_place(tmp_path, name):
    text, expected = FILES[name]
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose("sft", config=file, complete=False)
    problems = caught.value.problems
    if name == "a key of 200,000 letters":  # YAML itself has no keys of that length
        expected = ": not YAML"
    assert any(expected in problem for problem in problems), problems[:3]
    assert len(problems) <= 31
    assert all(problem.isprintable() and len(problem) < 2000 for problem in problems)


def test_what_is_no_file_of_text_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("utf16.yaml").write_text("seed: 1", encoding="utf-16")
    Path("binary.yaml").write_bytes(b"seed: 1\0\1\2")
    with Path("large.yaml").open("wb") as file:
        file.truncate(1 << 30)
    os.mkfifo("pipe.yaml")
    Path("gone.yaml").symlink_to("nowhere")
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("folder.yaml").mkdir()
    Path("run").mkdir()
    Path("run/config.yaml").write_text("seed: 1")
    Path("secret.yaml").write_text("seed: 1")
    Path("secret.yaml").chmod(0o000)
    expected = {
        "utf16.yaml": "not UTF-8", "binary.yaml": "binary", "large.yaml": "1.1 GB", "pipe.yaml": "a pipe",
        "gone.yaml": "a link to nothing", "loop.yaml": "link to itself", "folder.yaml": "a folder, not a config",
        "run": "give the config in it, run/config.yaml", "/dev/zero": "a device", "x" * 5000: "x",
        "https://x.org/a.yaml": "download it",
    }  # fmt: skip
    if os.getuid():
        expected["secret.yaml"] = "permission denied"
    for name, words in expected.items():
        for what, config in ((name, None), ("sft", name)):
            with pytest.raises(ConfigError, match=words):
                compose(what, config=config)


def test_a_config_that_the_user_names_may_be_a_link_and_that_of_a_run_may_not_leave_it(tmp_path):
    from tt_train.settings.composing import compose_run

    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "config.yaml"
    link.symlink_to(tmp_path / "mine.yaml")
    assert compose("sft", config=link, complete=False).seed == 3
    with pytest.raises(ConfigError, match="a link that leaves its folder"):
        compose_run(tmp_path / "run")


BAD_SIZES = [
    ("batch_size", 10**12, "at most 1,000,000"), ("micro_batch_size", 10**12, "at most 1,000,000"),
    ("max_steps", 10**30, "at most 1,000,000,000"), ("epochs", 10**30, "at most 1,000,000"),
    ("save_every", 10**30, "at most 1,000,000,000"), ("eval_every", -1, "at least 1"),
    ("data.max_seq_len", 10**9, "at most 16,777,216"), ("data.num_workers", 10**6, "at most 256"),
    ("data.worker_timeout_s", 1e30, "at most 1,000,000"), ("adapter.rank", 10**7, "at most 65,536"),
    ("adapter.rank_pattern", {"q_proj": 10**7}, "rank_pattern.q_proj: must be at least 1 and at most 65,536"),
    ("samples.max_new_tokens", 10**9, "at most 1,048,576"), ("seed", -1, "at least 0"),
    ("seed", 2**64, "below 2^64, torch's range"), ("seed", 10**30, "below 2^64"), ("seed", 10**400, "fp32 can hold"),
    ("optimizer.lr", float("inf"), "a finite number"), ("optimizer.lr", float("nan"), "a finite number"),
    ("optimizer.lr", 1e300, "fp32 can hold"), ("optimizer.lr", 0.0, "must be positive"),
    ("optimizer.weight_decay", float("inf"), "a finite number"), ("optimizer.momentum", 1.0, "below 1"),
    ("schedule.warmup_ratio", float("nan"), "a finite number"), ("schedule.min_lr_ratio", 1.5, "below 1"),
    ("data.max_dropped_share", float("nan"), "a finite number"), ("data.max_dropped_share", 1.5, "at most 1"),
    ("data.eval", 1.5, "5 % is 0.05"), ("data.eval", {"a.jsonl": 0}, "must be a positive number"),
    ("adapter.dropout", -0.1, "at least 0 and below 1"), ("adapter.init", "pizza", "did you mean 'pissa'?"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), BAD_SIZES, ids=[f"{k}={str(v)[:12]}" for k, v, _ in BAD_SIZES])
def test_absurd_and_infinite_numbers_are_refused_with_the_bound_in_code_as_in_a_file(tmp_path, key, value, expected):
    from tt_train.config import AdapterSection, SFTConfig
    from tt_train.settings.keys.mistakes import mistakes

    config = SFTConfig(adapter=AdapterSection())
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    assert [line for line in mistakes(config) if key in line and expected in line], mistakes(config)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"batch_size": "8"}, "batch_size: expected a whole number, got the text '8'; the default is 16"),
        ({"batch_size": True}, "batch_size: expected a whole number, got true"),
        ({"batch_size": 8.0}, "batch_size: expected a whole number, got 8.0"),
        ({"compile": 1}, "compile: expected true or false, got 1"),
        ({"output_dir": Path("x")}, "output_dir: expected text or null, got PosixPath('x')"),
        ({"model": "DIR"}, "model: expected keys (path, "),
        ({"adapter": {"rank": 8}}, "adapter: expected keys (rank, "),
        ({"loggers": "wandb"}, "loggers: expected a list such as [a, b], or names with options such as {a: {"),
        ({"seed": None}, "seed: expected a whole number, got null; the default is 0"),
    ],
)
def test_a_config_made_by_code_is_checked_before_a_recipe_does_anything(made, expected):
    from tt_train.config import SFTConfig
    from tt_train.job import assemble
    from tt_train.recipes import sft

    for begin in (sft.main, assemble):
        with pytest.raises(ConfigError) as caught:
            begin(SFTConfig(**made))
        assert expected in caught.value.problems[0]


def test_a_run_with_the_largest_seed_trains(words, tmp_path, monkeypatch):
    from tt_train.recipes import sft

    monkeypatch.chdir(tmp_path)
    config = compose("sft", overrides=[*words, "max_steps=1", f"seed={2**64 - 1}", "data.eval=0.2", "adapter.rank=2"])
    assert (sft.main(config) / "adapter").is_dir()
