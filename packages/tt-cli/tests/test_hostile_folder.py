"""``tt`` in a folder that somebody else made: what it holds is read where the command names it, and never run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "torch",
    "tt_train",
    "tt_data",
    "json",
    "click",
    "yaml",
    "usercustomize",
    "sitecustomize",
    "conftest",
    "evil",
)
PROGRAMS = ("git", "uname", "fc-list", "latex", "sh", "cc", "gcc", "c++", "g++", "nvidia-smi", "ldconfig", "python")


@pytest.fixture
def hostile(tmp_path: Path, model_dir: Path, rows_file: Path) -> Path:
    """A model folder with modules, programs and settings of its own, each of which would leave the file ``ran``."""
    folder, mark = tmp_path / "hostile", tmp_path / "ran"
    shutil.copytree(model_dir, folder)
    shutil.copy(rows_file, folder / "rows.jsonl")
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('module {name}')\n")
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho program {name} >> {mark}\n")
        (folder / name).chmod(0o755)
    (folder / "matplotlibrc").write_text("backend: module://evil\ntext.usetex: True\n")
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '-p evil'\n")
    (folder / ".env").write_text("HF_ENDPOINT=http://127.0.0.1:9\nPYTHONSTARTUP=evil.py\n")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "refs").mkdir()
    (folder / ".git" / "HEAD").write_text(40 * "a" + "\n")
    (folder / ".git" / "config").write_text(f"[core]\n\tfsmonitor = {folder / 'git'}\n")
    return folder


def tt(*words: str, cwd: Path, home: Path, timeout: int = 100) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("tt")
    command = [str(script)] if script.exists() else [sys.executable, "-P", "-m", "tt_cli"]
    environment = {**os.environ, "PATH": os.pathsep.join([".", "", os.environ["PATH"]]), "HOME": str(home)}
    return subprocess.run([*command, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def test_nothing_in_the_working_directory_is_run(hostile: Path, tmp_path: Path) -> None:
    words = ["model.path=.", "data.train=rows.jsonl", "model.dtype=fp32", "adapter.rank=2", "max_steps=1"]
    for command in (["run", "sft", *words, "samples.max_new_tokens=2", "-o", "../run"], ["report", "../run"], ["env"]):
        done = tt(*command, cwd=hostile, home=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert (tmp_path / "run" / "report.png").exists()
    assert f'"commit": "{40 * "a"}"' in (tmp_path / "run" / "manifest.json").read_text()


def test_a_pipe_in_the_place_of_a_file_of_settings_does_not_stop_a_report(
    hostile: Path, tmp_path: Path, lora_run: Path
) -> None:
    (hostile / "matplotlibrc").unlink()
    os.mkfifo(hostile / "matplotlibrc")
    shutil.copytree(lora_run, tmp_path / "run")
    assert tt("report", "../run", cwd=hostile, home=tmp_path).returncode == 0
