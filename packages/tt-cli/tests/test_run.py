"""``tt run``: which recipe gets which config, and what comes back. The recipe here is a file that trains nothing."""

import json
import textwrap
from pathlib import Path

import pytest

RECIPE = '''
    """A recipe of one's own."""
    import json
    import os
    from dataclasses import dataclass
    from pathlib import Path
    from tt_train.config import SFTConfig, to_dict
    from tt_train.run.console import RunFacts

    @dataclass
    class Config(SFTConfig):
        beta: float = 0.1

    def main(config, *, console, resume, dry_run):
        run = Path(config.output_dir or "runs/one")
        given = {**to_dict(config), "resume": resume, "dry_run": dry_run}
        if config.beta > 1:
            raise ValueError("beta is above 1")
        run.mkdir(parents=True)
        (run / "given.json").write_text(json.dumps(given))
        console.start(RunFacts(model="m", method="full", parameters=2, trainable=2,
                               data=["1 text rows"], steps_total=1, device="cpu", dtype="fp32",
                               run_dir=str(run), sample=[("a", True)]))
        if config.seed == 13:
            raise ValueError("step 1 failed")
        if config.seed == 15:
            from tt_train.errors import Interrupted
            raise Interrupted(15, str(run / "checkpoints" / "step-000001"), 1)
        return run
'''
BASE = ("model.path=m", "data.train=d")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(RECIPE))
    return file


def given(run: Path) -> dict:
    return json.loads((run / "given.json").read_text())


def test_the_last_line_of_stdout_is_the_run_directory_and_the_rest_goes_to_stderr(tt, recipe):
    answer = tt("run", "mine.py", *BASE)
    assert (answer.code, answer.out) == (0, "runs/one\n")
    assert "2 parameters" in answer.err


def test_words_override_the_config_file_which_overrides_defaults(tt, recipe):
    Path("c.yaml").write_text("model: {path: m}\ndata: {train: d}\nseed: 3\nbatch_size: 4\n")
    assert tt("run", "mine.py", "--config", "c.yaml", "seed=5", "beta=0.5").code == 0
    found = given(Path("runs/one"))
    assert (found["seed"], found["batch_size"], found["micro_batch_size"], found["beta"]) == (5, 4, 2, 0.5)


def test_o_names_the_run_directory(tt, recipe):
    assert tt("run", "mine.py", *BASE, "-o", "a: b").out == "a: b\n"
    assert given(Path("a: b"))["output_dir"] == "a: b"


def test_resume_and_dry_run_reach_the_recipe(tt, recipe):
    tt("run", "mine.py", *BASE, "-o", "a")
    tt("run", "mine.py", *BASE, "-o", "b", "--resume", "auto", "--dry-run")
    assert (given(Path("a"))["resume"], given(Path("a"))["dry_run"]) == (None, False)
    assert tt("run", "mine.py", *BASE, "-o", "c", "--dry-run").out == ""
    assert (given(Path("b"))["resume"], given(Path("b"))["dry_run"]) == ("auto", True)


def test_a_mistake_before_the_run_begins_is_exit_2(tt, recipe):
    answer = tt("run", "mine.py", *BASE, "beta=2")
    assert (answer.code, answer.out, answer.err) == (2, "", "error: beta is above 1\n")


def test_an_error_after_the_run_began_is_exit_1_with_its_traceback_in_the_log(tt, recipe):
    answer = tt("run", "mine.py", *BASE, "seed=13")
    assert (answer.code, answer.out) == (1, "")
    assert "error: step 1 failed\n" in answer.err
    assert "Traceback" not in answer.err
    assert Path("runs/one/train.log").read_text().count("ValueError: step 1 failed") == 1


def test_a_traceback_that_the_recipe_has_logged_is_not_logged_again(tt, recipe):
    logs = '(run / "train.log").write_text("ValueError: step 1 failed\\n")'
    recipe.write_text(recipe.read_text().replace("    if config.seed == 13:", f"    {logs}\n    if config.seed == 13:"))
    assert tt("run", "mine.py", *BASE, "seed=13").code == 1
    assert Path("runs/one/train.log").read_text() == "ValueError: step 1 failed\n"


def test_v_shows_the_traceback_of_a_failed_run(tt, recipe):
    assert "Traceback" in tt("run", "mine.py", *BASE, "seed=13", "-v").err


def test_an_interrupted_run_still_names_its_directory(tt, recipe):
    answer = tt("run", "mine.py", *BASE, "seed=15")
    assert (answer.code, answer.out) == (143, "runs/one\n")
    assert "stopped by SIGTERM after step 1" in answer.err
    assert "error:" not in answer.err


WRONG = [
    (["--lr", "3"], "no option --lr; did you mean optimizer.lr=3?"),
    (["--max-steps=20"], "no option --max-steps; did you mean max_steps=20?"),
    (["--rnak=4"], "no option --rnak; did you mean adapter.rank=4?"),
    (["-lr=3"], "no option -lr; did you mean optimizer.lr=3?"),
    (["--seed", "--dry-run"], "no option --seed; did you mean seed=VALUE?"),
    (["--resum", "auto"], "no option --resum; did you mean '--resume'?"),
    (["--zzzzz"], "no option --zzzzz; a config key is written zzzzz=VALUE"),
    (["sed=3"], "sed: unknown key; did you mean 'seed'?"),
    (["adapter.rnk=3"], "adapter.rnk: unknown key; did you mean 'adapter.rank'?"),
    (["seed=x"], "seed: expected a whole number, got the text 'x'"),
    (["seed"], "seed: expected key=value"),
    (["lora.yaml"], "'lora.yaml' is not KEY=VALUE; did you mean --config lora.yaml?"),
    (["-vx"], "no option -x"),
    (["--", "-seed=3"], "unrecognized arguments: -seed=3; options of torchrun and what follows -- "),
    (["--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
    (["--config"], "option '--config' requires an argument"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_word_is_one_line_with_the_cure_and_nothing_is_written(tt, recipe, words, line):
    answer = tt("run", "sft", *BASE, *words)
    assert (answer.code, answer.out) == (2, "")
    assert line in answer.err
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["mine.py"]


def test_every_mistake_has_a_line(tt, recipe):
    answer = tt("run", "sft", "sed=3", "adapter.rnk=3", "batch_size=x")
    assert answer.code == 2
    assert [line.split(":")[2].strip() for line in answer.err.splitlines()] == ["sed", "adapter.rnk", "batch_size"]


@pytest.mark.parametrize("name", ["stf", "lora_finetune_singel_device", "lama/7b", "mien.yaml"])
def test_an_unknown_recipe_or_config_is_one_line(tt, recipe, name):
    answer = tt("run", name, *BASE)
    assert answer.code == 2
    assert answer.err.startswith(f"error: {name}: ")
    assert answer.err.count("\n") == 1


def test_the_nearest_recipe_is_suggested(tt, recipe):
    assert "did you mean 'sft'?" in tt("run", "stf", *BASE).err


def test_a_config_beside_a_config_is_refused(tt, recipe):
    Path("c.yaml").write_text("seed: 1\n")
    assert "give only one of the two" in tt("run", "c.yaml", "--config", "c.yaml").err


def test_a_recipe_file_that_is_missing_or_has_no_main_is_named(tt, recipe):
    answer = tt("run", "other.py", *BASE)
    assert (answer.code, answer.err.startswith("error: other.py: no such recipe file")) == (2, True)
    Path("empty.py").write_text("")
    answer = tt("run", "empty.py", *BASE)
    assert (answer.code, answer.err.startswith("error: empty.py: has no function main")) == (2, True)
    Path("broken.py").write_text("def main(:\n")
    answer = tt("run", "broken.py", *BASE)
    assert (answer.code, answer.err) == (
        2,
        f"error: {Path('broken.py')}:1: not Python: invalid syntax; correct this line\n",
    )


def test_a_dotted_component_needs_allow_import(tt, recipe):
    word = "optimizer.name=collections.OrderedDict"
    answer = tt("run", "mine.py", *BASE, word)
    assert answer.code == 2
    assert "--allow-import collections" in answer.err
    assert tt("run", "mine.py", *BASE, word, "--allow-import", "collections").code == 0


def test_a_run_is_compared_with_another_after_it_and_a_difference_is_exit_code_1(tt, model_dir, rows_file, tmp_path):
    words = ["run", "sft", f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "adapter.rank=2",
             "batch_size=4", "max_steps=2", "samples.num=0", "device=cpu"]  # fmt: skip
    assert tt(*words, "-o", str(tmp_path / "first")).code == 0
    again = tt("run", str(tmp_path / "first" / "config.yaml"), "-o", str(tmp_path / "again"), "--compare",
               str(tmp_path / "first"))  # fmt: skip
    assert (again.code, again.out) == (0, f"{tmp_path / 'again'}\n")
    assert again.err.splitlines()[-1].endswith("in all 2 steps that both have, with the same result")
    other = tt(*words, "seed=1", "-o", str(tmp_path / "other"), "--compare", str(tmp_path / "first"))
    assert (other.code, other.out) == (1, f"{tmp_path / 'other'}\n")
    assert "the first step that differs from" in other.err
    assert "seed: 1 here, 0 there" in other.err
    assert tt(*words, "-o", str(tmp_path / "no"), "--compare", str(tmp_path)).code == 2
    assert not (tmp_path / "no").exists()
