"""What mypy --strict sees of tt_train in a program that uses it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tt_ckpt
import tt_data
import tt_models
import tt_peft
import tt_train

PROGRAM = """
from pathlib import Path

import tt_train
from tt_train.models.export import export
from tt_train.report import write_report
from tt_train.run.listing import list_runs
from tt_train.records.run_files import FinishedRun

model, tokenizer = tt_train.load("runs/a")
ids: list[int] = tokenizer.encode("a")
width: int = model.config.hidden_size
merged: Path = tt_train.merge_run("runs/a", "merged", dry_run=True)
page, picture = write_report(["runs/a"])
names: list[str] = [page.name, picture.name if picture is not None else ""]
run = FinishedRun.at("runs/a")
adapter: Path | None = run.adapter if run is not None else None
losses: list[float | None] = [entry["loss"] for entry in list_runs()]
commands: list[str] = export("runs/a", "out")["commands"]
"""
MISTAKES = {
    "tt_train.merge": 'Module has no attribute "merge"',
    "tokenizer.encod('a')": '"Tokenizer" has no attribute "encod"',
    "picture.name": 'Item "None" of "Path | None" has no attribute "name"',
    "run.model": 'Item "None" of "FinishedRun | None" has no attribute "model"',
    "list_runs()[0]['losses']": 'TypedDict "ListedRun" has no key "losses"',
    "export('runs/a', 'out')['command']": 'TypedDict "Exported" has no key "command"',
}


def test_mypy_sees_the_types_of_a_program_and_every_mistake_in_one(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(PROGRAM + "".join(f"{line}\n" for line in MISTAKES))
    large = ("torch", "omegaconf", "datasets", "huggingface_hub", "tokenizers", "numpy", "jinja2", "yaml")
    skipped = ",".join(f"{name},{name}.*" for name in large)
    (tmp_path / "mypy.ini").write_text(f"[mypy-{skipped}]\nfollow_imports = skip\n")
    ours = (tt_ckpt, tt_data, tt_models, tt_peft, tt_train)
    sources = os.pathsep.join(str(Path(str(package.__file__)).parents[1]) for package in ours)
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "right.py", "wrong.py"],
        capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": sources, "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert "right.py" not in told.stdout, told.stdout
    errors = [line for line in told.stdout.splitlines() if line.startswith("wrong.py") and "error:" in line]
    assert len(errors) == len(MISTAKES), told.stdout
    for line, text in zip(errors, MISTAKES.values(), strict=True):
        assert text in line
