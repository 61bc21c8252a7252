"""The table of verbs, help, version and completion: quick, without torch."""

import importlib
import os
import subprocess
import sys

import click
import pytest

import tt_cli
from tt_cli.main import cli

LIGHT = [line.split() for line in ("--help", "--version", "ls", "ls --json", "run --help", "data --help")]


@pytest.mark.parametrize("verb", cli.table)
def test_every_row_of_the_table_is_a_command_of_that_name(verb):
    command = importlib.import_module(cli.table[verb][0]).command
    assert isinstance(command, click.Command)
    assert command.name == verb


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_light_commands_import_neither_torch_nor_rich_nor_more_of_a_leaf_than_redact(tt_process, args):
    answer = tt_process(*args, python=["-X", "importtime"])
    assert answer.code == 0
    modules = {line.rsplit("|", 1)[-1].strip() for line in answer.err.splitlines() if "|" in line}
    imported = {name.split(".")[0] for name in modules}
    assert "click" in imported
    assert not imported & {"torch", "numpy", "rich", "omegaconf", "tt_models", "tt_data", "tt_peft"}
    assert {name for name in modules if name.startswith("tt_ckpt")} == {"tt_ckpt", "tt_ckpt.redaction"}


def test_alone_it_prints_its_help_on_stdout(tt):
    answer = tt()
    assert answer.code == 0
    assert answer.err == ""
    assert all(verb in answer.out for verb in cli.table)


def test_version(tt):
    assert tt("--version").out == f"tt {tt_cli.__version__}\n"


def test_a_wrong_verb_is_answered_with_the_right_one(tt):
    answer = tt("rnu")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err == "error: tt has no verb 'rnu'; did you mean 'run'? (see tt --help)\n"


def test_a_wrong_verb_within_data_is_answered_with_the_right_one(tt):
    answer = tt("data", "shwo")
    assert answer.code == 2
    assert "did you mean 'show'?" in answer.err


def test_a_wrong_option_is_answered_with_the_right_one(tt):
    answer = tt("ls", "--jsn")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "error: no option --jsn; did you mean '--json'? (see tt ls --help)\n"


def test_a_pipe_that_closes_early_is_no_traceback():
    script = f"{sys.executable} -m tt_cli cat sft model.path=m data.train=d | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_terminal_that_lacks_a_character_shows_its_escape(tt_process):
    code = "import sys; from tt_cli.main import main; main(['--version']); print(chr(0x27e6))"
    settings = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=60)
    assert done.stdout.splitlines()[1] == "\\u27e6"


@pytest.mark.parametrize("args", [["--help"], ["ls"]], ids=" ".join)
def test_light_commands_start_in_a_fifth_of_a_second_of_cpu_time(args, tmp_path):
    code = f"from tt_cli.main import main; main({args})"
    script = f"import resource, sys; {code}; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
            for _ in range(3)]  # fmt: skip
    # the least of them: the first compiles, and others may have to share their core
    assert min(float(run.stderr.split()[-1]) for run in runs) < 0.2
