"""Every verb with a result answers in JSON, with the keys that docs/command-line.md lists, and prints nothing else."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import click
import pytest

from tt_cli.main import cli, main
from tt_cli.verbs.data_show import command as data_show

PAGE = Path(__file__).parents[3] / "docs" / "command-line.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the page is in the repository only")
_CTX = click.Context(cli)
VERBS = {name: cli.get_command(_CTX, name) or cli for name in cli.table if name != "data"} | {"data show": data_show}


def table() -> dict[str, list[str]]:
    """Verb -> the keys that the page promises."""
    section = PAGE.read_text(encoding="utf-8").split("## Keys of JSON output")[1]
    return {
        verb: re.findall(r"`(\w+)`", keys.split(";")[0])  # what follows is there for some questions only
        for verb, keys in re.findall(r"^\| `tt ([\w -]+)` \| (.*) \|$", section, flags=re.MULTILINE)
    }


def test_every_verb_with_a_result_has_a_row_of_keys():
    with_json = {name for name, verb in VERBS.items() if any("--json" in param.opts for param in verb.params)}
    assert set(table()) == with_json
    # a conversation and a script for a shell are no results
    assert set(VERBS) - with_json <= {"chat", "completion"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_dir, rows_file):
    """A folder with what the commands below name."""
    folder = tmp_path_factory.mktemp("json")
    shutil.copytree(model_dir, folder / "MODEL")
    shutil.copy(rows_file, folder / "rows.jsonl")
    (folder / "old.yaml").write_text(
        "model: {_component_: torchtune.models.llama3_2.lora_llama3_2_1b}\n"
        "dataset: {_component_: torchtune.datasets.alpaca_dataset}\n"
        "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}\n"
    )
    words = ["model.path=MODEL", "data.train=rows.jsonl", "adapter.rank=2", "max_steps=1", "model.dtype=fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "sft", *words, "samples.max_new_tokens=2", "-o", "runs/one"]) == 0
    return folder


GOOD = "sft model.path=MODEL data.train=rows.jsonl adapter.rank=2 max_steps=1 model.dtype=fp32 samples.max_new_tokens=2"
CALLS = [
    f"run {GOOD} -o runs/two",
    f"run {GOOD} -o runs/three --dry-run",
    f"validate {GOOD}",
    f"plan {GOOD}",
    f"cat {GOOD}",
    "cp sft new.py",
    "cp sft new.py --dry-run",
    "ls",
    "data show rows.jsonl --tokenizer MODEL",
    "watch runs/one",
    "report runs/one",
    "eval runs/one --data rows.jsonl --max-new-tokens 2",
    "generate runs/one red --max-new-tokens 2",
    "merge runs/one -o out",
    "merge runs/one -o out --dry-run",
    "export runs/one -o out",
    "export runs/one -o out --dry-run",
    "convert MODEL out --to meta",
    "convert MODEL out --to meta --dry-run",
    "upload runs/one me/it --dry-run",
    "migrate old.yaml",
    "rm-checkpoints runs/one",
    "rm-checkpoints runs/one --dry-run",
    "quantize runs/one -o out --to int8 --dry-run",
    "env",
]


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("words", CALLS)
def test_stdout_is_one_object_with_the_promised_keys(tt, place, words):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    answer = tt(*words.split(), "--json", "-q")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)  # nothing else is there
    assert found.pop("ok") is True
    name = "data show" if words.startswith("data") else words.split()[0]
    promised = table()[name]
    assert set(promised) <= set(found)
    if "--dry-run" in words:
        assert found["dry_run"] is True
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("words", [f"run {GOOD} -o runs/three", "merge runs/one -o out", "export runs/one -o out",
                                   "convert MODEL out --to meta", "cp sft new.py", "rm-checkpoints runs/one",
                                   "upload runs/one me/it", "quantize runs/one -o out --to int8"])  # fmt: skip
def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tt, place, words):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    answer = tt(*words.split(), "--dry-run")
    assert answer.code == 0
    assert re.search(r"^would (train|write|send|free)", answer.err, flags=re.MULTILINE), answer.err
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_every_verb_that_writes_has_a_dry_run():
    writing = {"run", "merge", "convert", "export", "upload", "download", "cp", "quantize", "rm-checkpoints"}
    for name in writing & set(VERBS):
        assert any("--dry-run" in param.opts for param in VERBS[name].params), name


def test_a_failed_verb_answers_in_json_too(tt, place):
    answer = tt("run", "sft", "--json", "model.path=MODEL", "data.train=absent.jsonl", "optimizer.lrr=1")
    assert answer.code == 2
    assert answer.json["ok"] is False
    assert "did you mean 'optimizer.lr'?" in answer.json["errors"][0]


def test_a_run_that_fails_after_it_began_names_itself_in_json(tt, place):
    (place / "bad.py").write_text(
        "from pathlib import Path\nfrom tt_train.run.console import RunFacts\n\n"
        "def main(config, *, console, resume, dry_run):\n    Path('runs/bad').mkdir()\n"
        "    console.start(RunFacts(model='m', method='full', parameters=1, trainable=1, steps_total=1, device='cpu',\n"
        "                           dtype='fp32', run_dir='runs/bad'))\n    raise RuntimeError('late')\n"
    )
    answer = tt("run", "bad.py", "model.path=MODEL", "data.train=rows.jsonl", "--json")
    assert answer.code == 1
    assert answer.json == {"ok": False, "errors": ["RuntimeError: late"], "run": "runs/bad"}


def test_what_is_too_slow_to_run_here_has_the_promised_keys_too(tt, monkeypatch, tmp_path):
    from tt_ckpt.hub.download import Download
    from tt_cli.quickstart.story import Outcome
    from tt_cli.verbs import quickstart

    done = Download(repo_id="a/b", revision="0", path="p", files=["f"], num_bytes=1, num_verified=1, seconds=0.1)
    monkeypatch.setattr("tt_ckpt.hub.download.download", lambda *_, **__: done)
    assert list(tt("download", "a/b", "--json").json) == ["ok", *table()["download"]]
    values = {field.name: {} for field in dataclasses.fields(Outcome)}
    monkeypatch.setattr(Outcome, "shortfalls", [])
    assert list(quickstart._as_json(Outcome(**values), tmp_path, 1.0)) == ["ok", *table()["quickstart"]]  # type: ignore[arg-type]
    certificate = {key: {} for key in table()["verify"]} | {"passed": True, "reference_errors": {}}
    monkeypatch.setattr("tt_train.models.verify.verify", lambda *_, **__: certificate)
    assert set(table()["verify"]) <= set(tt("verify", "MODEL", "--json").json)


def test_json_goes_with_no_check_of_ranks(tt):
    answer = tt("run", "--check", "--json")
    assert answer.code == 2
    assert "--json has no result to print with --check" in answer.err


def test_every_choice_of_an_option_is_said_in_its_help():
    for verb in VERBS.values():
        for param in verb.params:
            if isinstance(param, click.Option) and isinstance(param.type, click.Choice) and param.metavar:
                assert all(str(choice) in (param.help or "") + param.metavar for choice in param.type.choices)
