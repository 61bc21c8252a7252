"""Run contestants in turn, each in a process and an environment of its own, and keep what they measured as JSON.

nox -s bench -- --suite cpu                    # everything that the suite has; README.md beside this file
nox -s bench -- --suite decode --quick         # tiny shapes, two rounds: whether it runs
nox -s bench -- --tables                       # write the tables of README.md and docs/ from results/*.json
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
import workloads  # noqa: E402
from suites import SUITES, Cell, cells_of  # noqa: E402

Answer = dict[str, Any]
TORCH = "torch==2.13.0"
HF = ["transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "bitsandbytes==0.50.2", "accelerate==1.15.0"]
# tt is measured in the environment that runs this file: nox's dev, with the versions of constraints.txt
ENVIRONMENTS = {
    "hf": [TORCH, *HF, "trl==1.16.0", "lm-eval==0.4.13", "sentencepiece==0.2.1"],
    "torchtune": [TORCH, "torchtune==0.6.1", "torchao==0.15.0"],  # torchao 0.16 and later fail
    "litgpt": [TORCH, "litgpt==0.5.13", "requests==2.34.2"],  # its command line needs requests
}
UNWANTED = {"litgpt": ["torchvision"]}  # a build for another torch, which fails to import
HOME = {"tt": None, "limits": None, "transformers": "hf", "trl": "hf", "torchtune": "torchtune", "litgpt": "litgpt"}
CALM = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
FIGURES = ("rate", "cpu_s", "wall_s", "peak_mb", "grown_mb", "loading_mb")


# ---- environments ----------------------------------------------------------------------------------------------------


def interpreter(contestant: str, options: argparse.Namespace) -> str | None:
    """The Python of a contestant's environment, which is made if it is not there; None if it cannot be."""
    home = HOME[contestant]
    given = dict(pair.split("=", 1) for pair in options.python)
    if home is None or home in given:
        return given.get(home or "tt", sys.executable)
    folder = options.envs.resolve() / f"bench-{home}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").exists() and not (options.no_build or _build(folder, python, home)):
        return None
    return str(python) if python.exists() else None


def _build(folder: Path, python: Path, home: str) -> bool:
    """Install an environment with uv, or with venv and pip. uv reads UV_FIND_LINKS, pip PIP_FIND_LINKS."""
    print(f"making {folder}: {' '.join(ENVIRONMENTS[home])}", file=sys.stderr)
    env = dict(os.environ)
    if uv := shutil.which("uv"):
        if links := env.get("PIP_FIND_LINKS"):
            env.setdefault("UV_FIND_LINKS", ",".join(links.split()))
        make, pip = [uv, "venv", "-q", "--clear", "-p", sys.executable, str(folder)], [uv, "pip"]
        words = {"install": ["install", "-q", "-p", str(python)], "uninstall": ["uninstall", "-q", "-p", str(python)]}
    else:
        make, pip = [sys.executable, "-m", "venv", "--clear", str(folder)], [str(python), "-m", "pip"]
        words = {"install": ["install", "-q"], "uninstall": ["uninstall", "-q", "-y"]}
    commands = [make, [*pip, *words["install"], *ENVIRONMENTS[home]]]
    commands += [[*pip, *words["uninstall"], name] for name in UNWANTED.get(home, [])]
    for command in commands:
        if subprocess.run(command, env=env, check=False).returncode:
            print(f"{home}: {' '.join(command[:4])} ... failed, so its contestants do not take part", file=sys.stderr)
            return False
    (folder / "complete").touch()
    return True


# ---- one process -----------------------------------------------------------------------------------------------------


def ask(python: str, contestant: str, request: dict[str, Any]) -> Answer:
    """The answer of a process; ``missing`` or ``failed`` say why there is none."""
    if request["workload"] == "command":
        return _command(python, request)
    words = [python, str(HERE / "contestant.py"), contestant, json.dumps(request)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_variables(request))
    if done.returncode or not done.stdout.strip():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:300]}
    found: Answer = json.loads(done.stdout.splitlines()[-1])
    return found


def _variables(request: dict[str, Any]) -> dict[str, str]:
    """The environment of a run; what ``datasets`` kept of an earlier one is not there, so that each does the work."""
    return os.environ | CALM | {"HF_DATASETS_CACHE": f"{request['scratch']}/datasets"}


def _command(python: str, request: dict[str, Any]) -> Answer:
    """CPU seconds and peak memory of a command and its children."""
    words = [str(word).format(**request) for word in request["command"]]
    beside = Path(python).parent / words[0]
    if not beside.exists():
        return {"missing": f"there is no command {words[0]}"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(beside), *words[1:]], stdout=output, stderr=output, env=_variables(request),
                                   cwd=request["scratch"])  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            return {"failed": (output.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1][:300]}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.perf_counter() - began, "work": 1,
            "peak_mb": usage.ru_maxrss * unit / 1e6}  # fmt: skip


# ---- one cell --------------------------------------------------------------------------------------------------------


def prepare(cell: Cell, folder: Path) -> dict[str, Any]:
    """The places of what the cell works on; each is made once for all cells that ask for the same."""
    asked, request = cell.request, dict[str, Any]()
    if "model" in cell.inputs or "tokenizer" in cell.inputs:
        key = "-".join(str(asked.get(word, "")) for word in ("shape", "dtype", "shards", "window"))
        place = folder / f"{cell.inputs[0]}-{key}"
        if not place.exists():
            _made(cell.inputs[0], place, asked)
        request["folder"] = str(place)
    if "rows" in cell.inputs:
        rows = (
            folder
            / "-".join(str(asked.get(word, "")) for word in ("kind", "rows", "shape", "longest", "length"))
            / "rows.jsonl"
        )
        if not rows.exists():
            workloads.write_rows(rows, asked)
        request |= {"rows_file": str(rows), "rows_folder": str(rows.parent)}
    if "tasks" in cell.inputs:
        tasks = folder / f"tasks-{asked['rows']}"
        if not tasks.exists():
            workloads.write_tasks(tasks, asked)
        request["tasks"] = str(tasks)
    return {"folder": str(folder)} | request


def _made(kind: str, place: Path, asked: dict[str, Any]) -> None:
    if kind == "model":
        workloads.write_model(place, asked)
    else:
        workloads.write_tokenizer(place, workloads.SHAPES[asked["shape"]][0])


def measure(cell: Cell, rounds: int, folder: Path, python_of: Callable[[str], str | None]) -> Answer:
    """Everyone in turn, in another order in every round; then figures, and why somebody has none."""
    inputs = prepare(cell, folder)
    answers: dict[str, list[Answer]] = {label: [] for label in cell.contestants}
    without: dict[str, str] = {}
    for turn in range(rounds):
        labels = [label for label in answers if label not in without]
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)] if labels else []:
            contestant = label.split()[0]
            python = python_of(contestant)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                request = {**cell.request, **cell.contestants[label], **inputs, "workload": cell.workload}
                request |= {"scratch": scratch}
                answer = ask(python, contestant, request) if python else {"missing": "its environment is not installed"}
            if reason := next((f"{word}: {answer[word]}" for word in ("missing", "failed") if word in answer), None):
                without[label] = reason
            else:
                answers[label].append(answer)
            print(f"{cell.name}, round {turn + 1}: {label}{f' is {reason}' if reason else ''}", file=sys.stderr)
    present = {label: found for label, found in answers.items() if label not in without}
    without |= refused({label: found[0] for label, found in present.items()}, cell.tolerance)
    return summary(cell, {label: found for label, found in present.items() if label not in without}, without)


def refused(answers: dict[str, Answer], tolerance: float) -> dict[str, str]:
    """Who did not do the work, and why: a figure that must be above 0 is not, or one differs from that of the first
    contestant that is not tt, or of tt if it is alone."""
    reasons: dict[str, str] = {}
    for label, answer in answers.items():
        for name, value in answer.get("positive", {}).items():
            if not (math.isfinite(value) and value > 0):
                reasons[label] = f"refused: {name} is {value}"
    left = [label for label in answers if label not in reasons and answers[label].get("equal")]
    first = next((label for label in left if not label.startswith("tt")), left[0] if left else None)
    for label in left:
        for name, expected in answers[first]["equal"].items() if first else ():
            value = answers[label]["equal"].get(name, math.nan)
            if not (math.isfinite(value) and abs(value - expected) <= tolerance * abs(expected)):
                reasons[label] = f"refused: {name} is {value:.6g}, {first} has {expected:.6g}"
    return reasons


def statistics_of(values: Iterable[float]) -> dict[str, float]:
    every = list(values)
    spread = statistics.stdev(every) if len(every) > 1 else 0.0
    return {"mean": statistics.fmean(every), "std": spread, "min": min(every), "max": max(every),
            "median": statistics.median(every)}  # fmt: skip


def summary(cell: Cell, answers: dict[str, list[Answer]], without: dict[str, str]) -> Answer:
    """The cell as it is kept: figures of each contestant, and how many times tt has its rate, round by round."""
    cuda = cell.request.get("device", "cpu") != "cpu"
    for answer in (answer for found in answers.values() for answer in found):
        answer["rate"] = answer["work"] / max(answer["wall_s" if cuda else "cpu_s"], 1e-9)
    kept: dict[str, Answer] = {}
    for label, found in answers.items():
        kept[label] = {key: statistics_of(each[key] for each in found) for key in FIGURES if key in found[0]}
        kept[label] |= {key: found[0][key] for key in ("work", "equal", "positive", "versions", "capability")
                        if key in found[0]}  # fmt: skip
        if "tt" in answers and label != "tt":
            pairs = zip(answers["tt"], found, strict=True)
            kept[label]["tt_over_it"] = statistics_of(own["rate"] / other["rate"] for own, other in pairs)
    return {"name": cell.name, "workload": cell.workload, "unit": cell.unit, "request": cell.request,
            "contestants": kept, "without": without}  # fmt: skip


# ---- a suite ---------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1,
             "features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags],
             "python": platform.python_version(), "torch": version("torch"),
             "variables": {name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
                           if name in os.environ}}  # fmt: skip
    if smi := shutil.which("nvidia-smi"):
        asked = [smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def run(suite: str, options: argparse.Namespace) -> Answer:
    """Every chosen cell of a suite. The file is written again after each, so that a stopped suite keeps what it has.

    Cells that the file had before, measured on this machine with this torch, stay until they are measured again.
    """
    every = cells_of(suite, quick=options.quick)
    cells = [cell for cell in every if re.search(options.only, cell.name)]
    wanted = options.contestants.split(",") if options.contestants else list(HOME)
    report: Answer = {"suite": suite, "quick": options.quick, "machine": machine(), "cells": []}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if all(before.get(key) == report[key] for key in ("suite", "quick", "machine")):
            report["cells"] = before["cells"]
    pythons: dict[str, str | None] = {}

    def python_of(contestant: str) -> str | None:
        if contestant not in pythons:
            pythons[contestant] = interpreter(contestant, options)
        return pythons[contestant]

    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for cell in cells:
            labels = {
                label: more
                for label, more in cell.contestants.items()
                if label.split()[0] in wanted and not (options.skip and options.skip in label)
            }
            load = os.getloadavg()[0]
            made = measure(Cell(**{**vars(cell), "contestants": labels}), options.rounds, Path(folder), python_of)
            made |= {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "rounds": options.rounds}
            kept = {one["name"]: one for one in report["cells"]}
            kept[cell.name] = made | {"load_average": [load, os.getloadavg()[0]]}
            report["cells"] = [kept[one.name] for one in every if one.name in kept]
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("script", nargs="*", help="a script beside this file, such as parity, with its own words")
    parser.add_argument("--suite", choices=list(SUITES), help="which cells to measure")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cells whose names have a match")
    parser.add_argument("--contestants", metavar="A,B", help=f"only these of {', '.join(HOME)}")
    parser.add_argument("--skip", metavar="WORD", help="no contestants with WORD in their labels, such as compiled")
    parser.add_argument("--rounds", type=int, help="how often each contestant runs (5; with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: try the harness, measure nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results/SUITE-CPU.json by default")
    parser.add_argument("--envs", type=Path, default=ROOT / ".nox", metavar="DIR", help="where environments are kept")
    parser.add_argument("--no-build", action="store_true", help="do not install an environment that is not there")
    parser.add_argument("--python", action="append", default=[], metavar="ENV=PATH", help="use this Python for ENV")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where models and rows are made for the time")
    parser.add_argument("--tables", action="store_true", help="write the tables of README.md and docs/ from results/")
    options = parser.parse_args(words)
    import tables

    if options.script:
        return subprocess.run([sys.executable, str(HERE / f"{options.script[0]}.py"), *options.script[1:]],
                              check=False).returncode  # fmt: skip
    if options.tables:
        return tables.write_all()
    if options.suite is None:
        parser.error("give --suite, --tables or the name of a script")
    if options.suite == "gpu" and not has_gpu():
        print("--suite gpu needs a CUDA GPU of 80 GB and torch's CUDA build: install it into the environment that runs "
              "this file, and run again", file=sys.stderr)  # fmt: skip
        return 2
    options.rounds = options.rounds or (2 if options.quick else 5)
    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    options.output = options.output or HERE / "results" / f"{options.suite}-{name}{'-quick' * options.quick}.json"
    report = run(options.suite, options)
    print(tables.table(report))
    return int(any(reason.startswith("refused") for cell in report["cells"] for reason in cell["without"].values()))


if __name__ == "__main__":
    sys.exit(main())
