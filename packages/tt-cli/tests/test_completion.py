"""The words that a shell completes, asked as a shell asks, and in the shells that are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tt_cli.completion import SCRIPTS


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with rows, two runs, one of which has a name that no shell takes as it is, and a ``tt`` on PATH."""
    for run in ("first", "o'dd $(touch canary)"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").write_text("recipe: sft\n")
        (tmp_path / "runs" / run / "manifest.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tt"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tt_cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def completed(tt, monkeypatch):
    """The values (kind, value) that complete a command line, whose last word is at the cursor."""

    def ask(line: str) -> list[tuple[str, str]]:
        before, _, word = line.rpartition(" ")
        monkeypatch.setenv("_TT_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", f"{before} ")
        monkeypatch.setenv("COMP_CWORD", word)
        answer = tt()
        monkeypatch.delenv("_TT_COMPLETE")
        assert (answer.code, answer.err) == (0, "")
        lines = [line.split("\t") for line in answer.out.splitlines() if line]
        return [(kind, value) for kind, value, _ in lines]

    return ask


@pytest.mark.parametrize(("line", "values"), [
    ("tt ru", ["run"]),
    ("tt data ", ["show"]),
    ("tt run sf", ["sft"]),
    ("tt run llama2/7b_l", ["llama2/7b_lora"]),
    ("tt run lora_finetune_s", ["lora_finetune_single_device"]),
    ("tt run sft --config smollm2/135m_l", ["smollm2/135m_lora"]),
    ("tt run sft --res", ["--resume"]),
    ("tt run sft optimizer.we", ["optimizer.weight_decay="]),
    ("tt run dpo loss.b", ["loss.beta="]),
    ("tt run sft loss.beta", []),
    ("tt run sft optimizer.name=adamw8", ["optimizer.name=adamw8bit"]),
    ("tt run sft data.packing=", ["data.packing=true", "data.packing=false"]),
    ("tt validate sft model.dtype=b", ["model.dtype=bf16"]),
    ("tt ls r", ["recipes", "runs"]),
    ("tt ls runs --sort s", ["size"]),
    ("tt chat r", ["runs/first"]),
    ("tt watch runs/", ["runs/first"]),
    ("tt report runs/first r", ["runs/first"]),
    ("tt rm-checkpoints r", ["runs/first"]),
    ("tt completion f", ["fish"]),
    ("tt nosuch wo", []),
    ("tt run --resume= wo", []),
])  # fmt: skip
def test_a_word_is_completed(completed, line, values):
    assert [value for kind, value in completed(line) if kind == "plain"] == values


@pytest.mark.parametrize("line", ["tt run mine.y", "tt run sft model.path=", "tt chat somewhere", "tt run sft -o x"])
def test_what_has_no_name_is_a_file(completed, line):
    assert [kind for kind, _ in completed(line)] == ["file"]


def test_an_open_quote_before_the_word_is_no_traceback(completed):
    completed("tt run 'sft optimizer.l")


def test_completion_takes_at_most_a_third_of_a_second_of_cpu_time_and_loads_no_torch():
    words = {"_TT_COMPLETE": "bash_complete", "COMP_WORDS": "tt run sft ", "COMP_CWORD": "optimizer."}
    code = "import sys; from tt_cli.main import main; main([]); print('torch' in sys.modules, file=sys.stderr)"
    script = f"import resource; {code}; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)"
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **words})
        for _ in range(2)  # the first may compile
    ]
    loaded, seconds = runs[-1].stderr.split()
    assert loaded == "False"
    assert min(float(run.stderr.split()[1]) for run in runs) < 0.3, seconds


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_is_what_the_verb_prints(tt, shell):
    assert tt("completion", shell).out == SCRIPTS[shell]


def test_bash_completes_for_real():
    script = """
    eval "$(tt completion bash)"
    ask() { COMP_LINE=$1 COMP_POINT=${#1}; _tt_completion tt 2>/dev/null; printf '%s,' "${COMPREPLY[@]}"; echo; }
    ask 'tt ru'; ask 'tt run sft optimizer.we'; ask 'tt run sft optimizer.name=adamw8'; ask 'tt chat r'
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    # bash takes the text after = for a word of its own
    assert done.stdout.splitlines() == ["run,", "optimizer.weight_decay=,", "adamw8bit,", "runs/first,"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_for_real(tmp_path):
    script = "tt completion fish | source; complete -C 'tt ru'; complete -C 'tt run sft optimizer.we'; "
    script += "complete -C 'tt run sft data.train=ro'; complete -C 'tt chat r'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "HOME": str(tmp_path)})  # fmt: skip
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert found == ["run", "optimizer.weight_decay=", "data.train=rows.jsonl", "runs/first"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("typed", "becomes"), [
    ("tt ru", "tt run "),
    ("tt run sft optimizer.we", "tt run sft optimizer.weight_decay="),
    ("tt chat runs/f", "tt chat runs/first "),
])  # fmt: skip
def test_zsh_completes_for_real(typed, becomes):
    script = r"""
    zmodload zsh/zpty; zpty shell zsh -f -i
    zpty -w shell 'autoload -Uz compinit && compinit -u -D; eval "$(tt completion zsh)"; PROMPT=; echo re''ady'
    zpty -r shell reply '*ready*'
    zpty -w -n shell "$1"$'\t'; sleep 3; zpty -w -n shell $'\x01[\x05]\n'
    zpty -r shell reply '*]*'; print -r -- "$reply"
    """
    done = subprocess.run(["zsh", "-f", "-c", script, "-", typed], capture_output=True, text=True, timeout=60)
    shown = done.stdout.replace("\x1b", "")
    assert becomes.split()[-1] in shown, done


def test_no_name_of_a_run_reaches_a_shell_as_a_command(completed):
    assert not any("canary" in value for line in ("tt chat ", "tt chat runs/o") for _, value in completed(line))
    assert not Path("canary").exists()
