"""A recipe file of one's own: what a run keeps of it, who may run it, and keys of its own."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

OWN = '''
from dataclasses import dataclass

from tt_train import RunConfig
from tt_train.recipes import sft


@dataclass
class Config(RunConfig):
    """Keys of my own."""

    lr_per_sequence: float = 1e-5
    note: str | None = None


def main(config, **settings):
    config.optimizer.lr = config.lr_per_sequence * config.batch_size
    return sft.main(config, **settings)
'''


@pytest.fixture
def words(tmp_path, monkeypatch, model_dir, rows_file) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    words = [
        f"model.path={model_dir}",
        f"data.train={rows_file}",
        "model.dtype=fp32",
        "adapter.rank=2",
        "samples.num=0",
    ]
    return [*words, "batch_size=4", "max_steps=2", "schedule.warmup_steps=0"]


@pytest.fixture
def run(tt, words) -> Path:
    assert tt("run", "mine.py", *words, "note=no", "-o", "own").code == 0
    return Path("own")


def read(run: Path) -> tuple[dict, dict, list[dict]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "manifest.json").read_text()), rows


def test_a_run_keeps_its_recipe_and_names_it_in_config_and_manifest(run):
    config, manifest, rows = read(run)
    sha256 = hashlib.sha256(OWN.encode()).hexdigest()
    assert (run / "mine.py").read_bytes() == Path("mine.py").read_bytes()
    assert (config["recipe"], config["recipe_sha256"]) == ("mine.py", sha256)
    assert (manifest["recipe"], manifest["recipe_sha256"]) == ("mine.py", sha256)
    assert (config["lr_per_sequence"], config["note"]) == (1e-5, "no")
    assert rows[0]["lr"] == pytest.approx(4e-5)


def test_its_config_alone_never_runs_the_file_beside_it(tt, run):
    (run / "mine.py").write_text("open('canary', 'w')\n" + OWN)
    for verb in ("run", "cat", "validate"):
        answer = tt(verb, "own/config.yaml")
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.count("\n") == 1
        assert answer.err.startswith("error: own/config.yaml:1: recipe: mine.py (sha256 ")
        assert (
            "a recipe file, which runs only if you name it: tt run own/mine.py --config own/config.yaml" in answer.err
        )
    assert not Path("canary").exists()


def test_the_copy_with_the_config_repeats_the_run(tt, run):
    assert tt("run", "own/mine.py", "--config", "own/config.yaml", "-o", "again").code == 0
    assert [row["loss"] for row in read(Path("again"))[2]] == [row["loss"] for row in read(run)[2]]
    assert (Path("again") / "mine.py").read_text() == OWN


def test_every_command_that_is_shown_for_a_run_names_its_recipe(tt, run):
    page = (run / "report.html").read_text()
    assert "tt run own/mine.py --config own/config.yaml</pre>" in page
    for path in ("adapter", "checkpoints"):
        shutil.rmtree(run / path)
    assert "start it again from step 1: tt run own/mine.py --config own/config.yaml -o NEW" in tt("chat", "own").err


def test_another_recipe_or_a_changed_one_does_not_repeat_it_unasked(tt, run, words):
    answer = tt("run", "sft", "--config", "own/config.yaml", "-o", "again")
    assert "recipe: this config is for mine.py (sha256 " in answer.err
    assert "not for sft; tt run own/mine.py --config own/config.yaml, or add recipe=sft" in answer.err
    Path("other.py").write_text(OWN)
    assert "not for other.py; " in tt("run", "other.py", "--config", "own/config.yaml", "-o", "again").err
    Path("mine.py").write_text(OWN + "# changed\n")
    answer = tt("run", "mine.py", "--config", "own/config.yaml", "-o", "again")
    assert answer.code == 2
    assert "mine.py is not the file that this config was run with (sha256 " in answer.err
    assert "tt run own/mine.py --config own/config.yaml" in answer.err
    assert not Path("again").exists()
    changed = ["recipe_sha256=null", "-o", "again"]
    assert tt("run", "mine.py", "--config", "own/config.yaml", *changed).code == 0


def test_resuming_by_another_recipe_or_a_changed_one_is_refused(tt, run, words):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = [*words, "max_steps=4", "-o", "own", "--resume", "auto"]
    answer = tt("run", "sft", *again)
    assert answer.code == 2
    assert '--resume: recipe: "mine.py" -> "sft"' in answer.err
    Path("mine.py").write_text(OWN + "# changed\n")
    answer = tt("run", "mine.py", *again, "note=no")
    assert answer.code == 2
    assert "--resume: recipe_sha256: " in answer.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_every_verb_takes_the_file(tt, words):
    shown = yaml.safe_load(tt("cat", "mine.py", *words).out)
    assert (shown["recipe"], "recipe_sha256" in shown, shown["lr_per_sequence"]) == ("mine.py", False, 1e-5)
    assert tt("cat", "mine.py").code == 0
    assert tt("validate", "mine.py", *words, "lr_per_sequence=1e-4").out == "mine.py: no mistakes found\n"
    Path("c.yaml").write_text("recipe: mine.py\nlr_per_sequence: 2e-5\n")
    assert yaml.safe_load(tt("cat", "mine.py", "--config", "c.yaml").out)["lr_per_sequence"] == 2e-5
    assert tt("validate", "mine.py", "--config", "c.yaml", *words).code == 0


def test_a_config_for_sft_may_be_run_by_a_recipe_of_ones_own(tt, words):
    Path("c.yaml").write_text("recipe: sft\nseed: 3\n")
    assert yaml.safe_load(tt("cat", "mine.py", "--config", "c.yaml").out)["recipe"] == "mine.py"


def test_mistyped_keys_of_ones_own_are_answered(tt, words):
    answer = tt("validate", "mine.py", *words, "lr_per_sequnce=1e-4", "lr_per_sequence=fast")
    assert "lr_per_sequnce: unknown key; did you mean 'lr_per_sequence'?" in answer.err
    answer = tt("validate", "mine.py", *words, "lr_per_sequence=fast")
    assert "lr_per_sequence: expected a number, got the text 'fast'" in answer.err
    assert "lr_per_sequence: must be a finite number" in tt("validate", "mine.py", *words, "lr_per_sequence=inf").err
    assert "unknown key" in tt("validate", "sft", *words, "lr_per_sequence=1e-4").err


FAULTY = {
    "import nowhere_to_be\n": "mine.py:1: ModuleNotFoundError: No module named 'nowhere_to_be'; install it: a recipe",
    "x = 1\nx.y\n": "mine.py:2: AttributeError: ",
    "def main(:\n": "mine.py:1: not Python: invalid syntax",
    "x = 1\n": "mine.py: has no function main(config, *, console, resume, dry_run)",
    "class Config: pass\ndef main(config): ...\n": "mine.py: Config must extend tt_train.RunConfig",
    "from tt_train import RunConfig\nclass Config(RunConfig):\n    beta: float = 1.0\ndef main(config): ...\n":
        "mine.py: Config is not a dataclass; write @dataclass above",
    "key = 'hf_abcdefghijklmnopqrstuvwxyz'\ndef main(config): ...\n": "mine.py: contains a secret",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTY, ids=lambda text: FAULTY[text][9:40])
def test_what_a_recipe_file_lacks_is_one_line(tt, words, text):
    Path("mine.py").write_text(text)
    for verb in ("run", "cat", "validate"):
        answer = tt(verb, "mine.py", *words)
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
        assert answer.err.startswith(f"error: {FAULTY[text]}")


def test_a_recipe_with_postponed_annotations_runs(tt, words):
    Path("mine.py").write_text("from __future__ import annotations\n" + OWN)
    assert tt("run", "mine.py", *words, "lr_per_sequence=1e-4", "-o", "own").code == 0
    assert not Path("__pycache__").exists()


def test_a_mistyped_file_name_is_answered_with_the_nearest(tt, words):
    assert "did you mean 'mine.py'?" in tt("run", "mien.py", *words).err
    assert "did you mean 'mine.py'?" in tt("run", "mine", *words).err
    assert "mine.py: a recipe file, not a config; tt run mine.py" in tt("run", "sft", "--config", "mine.py").err


LOSS = """
from tt_train.losses.cross_entropy import cross_entropy


def tripled(model, batch):
    part = cross_entropy(model, batch)
    return part._replace(loss=3 * part.loss)
"""


def test_allow_import_finds_modules_in_the_working_folder(tt, tt_process, words):
    Path("tripling.py").write_text(LOSS)
    named = ["loss.name=tripling.tripled", "--allow-import", "tripling"]
    answer = tt_process(
        "run", "sft", *words, *named, "-o", "a", python=["-P"]
    )  # as the script tt: no folder on the path
    assert (answer.code, answer.out) == (0, "a\n"), answer.err
    assert tt("run", "sft", *words, "-o", "b").code == 0
    assert read(Path("a"))[2][0]["loss"] == pytest.approx(3 * read(Path("b"))[2][0]["loss"], rel=1e-5)
    assert read(Path("a"))[1]["imports"] == {"tripling": hashlib.sha256(LOSS.encode()).hexdigest()}
    assert "tt run a/config.yaml --allow-import tripling</pre>" in (Path("a") / "report.html").read_text()
    assert "--allow-import tripling" in tt("validate", "sft", *words, named[0]).err
    assert "has no such name; did you mean 'tripled'?" in tt(
        "validate", "sft", *words, "loss.name=tripling.tripeld", "--allow-import", "tripling").err  # fmt: skip
    assert "did you mean 'tripling'?" in tt(
        "validate", "sft", *words, "loss.name=triplng.tripled", "--allow-import", "triplng").err  # fmt: skip


def test_a_run_is_not_resumed_with_a_loss_that_has_changed(tt_process, words):
    Path("tripling.py").write_text(LOSS)
    named = ["loss.name=tripling.tripled", "--allow-import", "tripling", "-o", "a"]
    assert tt_process("run", "sft", *words, *named, python=["-P"]).code == 0
    Path("tripling.py").write_text(LOSS.replace("3 *", "4 *"))
    answer = tt_process("run", "sft", *words, "max_steps=4", *named, "--resume", "auto", python=["-P"])
    assert answer.code == 2
    assert "--resume: tripling: its file has sha256 " in answer.err


def test_a_recipe_file_may_import_an_allowed_module_of_the_working_folder(tt_process, words):
    Path("tripling.py").write_text(LOSS)
    Path("mine.py").write_text("import tripling\n" + OWN)
    refused = tt_process("validate", "mine.py", *words, python=["-P"])
    assert (refused.code, "--allow-import tripling" in refused.err) == (2, True)
    assert tt_process("validate", "mine.py", *words, "--allow-import", "tripling", python=["-P"]).code == 0


SHADOWS = ("json", "pathlib", "torch", "yaml", "click", "omegaconf", "numpy", "tt_train", "random", "wandb", "ctypes")


def test_a_recipe_may_import_an_allowed_module_while_it_runs(tt_process, words, tmp_path):
    (tmp_path / "mine_late.py").write_text("RATE = 0.5\n")
    late = "def main(config, **settings):\n    import mine_late\n    assert mine_late.RATE == 0.5\n    return 'ran'\n"
    (tmp_path / "late.py").write_text(late)
    answer = tt_process("run", "late.py", *words, "--allow-import", "mine_late", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out.strip() == "ran"


@pytest.mark.parametrize(("place", "cure"), [
    (".", "; to let it be imported from the working folder, add --allow-import mine_helper"),
    ("sub", "; it is in sub, not in the working folder: cd sub, and add --allow-import mine_helper"),
    (None, "; install it: a recipe file imports what is installed, and what --allow-import names in the working "
     "folder"),
])  # fmt: skip
def test_a_module_that_a_recipe_cannot_import_is_answered_with_the_cure(tt, words, place, cure):
    Path("sub").mkdir()
    Path("sub/uses.py").write_text("import mine_helper\ndef main(config, **settings): ...\n")
    if place is not None:
        (Path(place) / "mine_helper.py").write_text("")
    answer = tt("validate", "sub/uses.py", *words)
    assert answer.code == 2
    assert answer.err == f"error: sub/uses.py:1: ModuleNotFoundError: No module named 'mine_helper'{cure}\n"


def test_modules_of_a_hostile_folder_never_replace_installed_ones(tt_process, words, tmp_path):
    for name in SHADOWS:
        Path(f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write({name!r})\n")
    Path("mine.py").write_text("import wandb\ndef main(config, **settings): ...\n")
    Path("focal.py").write_text("import helper\ndef loss(model, batch): ...\n")
    Path("helper.py").write_text("")
    assert tt_process("cat", "sft", cwd=tmp_path).code == 0
    answer = tt_process("cat", "sft", "loss.name=focal.loss", "--allow-import", "focal", cwd=tmp_path)
    assert (answer.code, "add --allow-import helper" in answer.err) == (2, True), answer.err
    allowed = ["--allow-import", "focal", "--allow-import", "helper"]
    assert tt_process("cat", "sft", "loss.name=focal.loss", *allowed, cwd=tmp_path).code == 0
    answer = tt_process(
        "cat", "mine.py", *allowed, cwd=tmp_path
    )  # wandb may be installed here: the folder's never runs
    assert "ModuleNotFoundError" in answer.err or answer.code == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pipe", "device", "folder", "binary", "large", "utf16", "link", "gone"])
def test_a_recipe_that_is_no_file_of_text_is_refused_and_a_link_that_was_typed_is_followed(tt, words, name):
    file, good = Path("odd.py"), "def main(config, **settings): ...\n"
    match name:
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
        case "binary":
            file.write_bytes(b"\x00\xff" * 100)
        case "large":
            file.write_text("#" * 300_000)
        case "utf16":
            file.write_text(good, encoding="utf-16")
        case "link":
            Path("real.py").write_text(good)
            file.symlink_to("real.py")
        case "gone":
            file.symlink_to("nowhere.py")
    answer = tt("cat", "odd.py")
    assert answer.code == (0 if name == "link" else 2)
    assert answer.err.count("\n") == (0 if name == "link" else 1)
