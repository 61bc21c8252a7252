"""The harness of benchmarks/: what it keeps, whom it refuses and names. No figure is compared with another."""

import ast
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import harness  # noqa: E402
import tables  # noqa: E402
from suites import QUICK, SUITES, Cell, cells_of  # noqa: E402


def test_a_suite_of_tt_alone_keeps_figures_machine_and_versions(tmp_path, capsys):
    words = ["--suite", "cpu", "--quick", "--only", "10.5M full fp32", "--contestants", "tt", "--rounds", "1"]
    assert harness.main([*words, "--no-build", "--output", str(tmp_path / "cpu.json")]) == 0
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report.keys() == {"suite", "quick", "machine", "cells"}
    assert {"cpu", "features", "torch", "python"} <= report["machine"].keys()
    [cell] = report["cells"]
    assert cell.keys() == {"name", "workload", "unit", "request", "contestants", "without", "commit", "date", "rounds",
                           "load_average"}  # fmt: skip
    own = cell["contestants"]["tt"]
    for figure in ("rate", "cpu_s", "wall_s", "peak_mb", "grown_mb"):
        assert own[figure].keys() == {"mean", "std", "min", "max", "median"}
        assert own[figure]["median"] > 0
    assert own["work"] == 4 * 63 * 2  # trained tokens: the first of each row is not predicted
    assert {"torch", "capability"} <= own["versions"].keys() | own.keys()
    assert "10.5M full fp32 | tt |" in capsys.readouterr().out


def test_cells_that_are_measured_later_join_those_of_the_same_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "measure", lambda cell, rounds, *_: _measured(cell.name, rounds))
    file = tmp_path / "loss.json"

    def names_after(*words):
        harness.main(["--suite", "loss", "--contestants", "tt", "--output", str(file), *words])
        return [(cell["name"], cell["rounds"]) for cell in json.loads(file.read_text())["cells"]]

    names_after("--only", "^log-probabilities, trained")
    found = names_after("--only", "^cross entropy, frozen", "--rounds", "2")
    assert found == [("cross entropy, frozen head", 2), ("log-probabilities, trained head", 5)]
    assert names_after("--only", "log.*trained", "--rounds", "3")[1] == ("log-probabilities, trained head", 3)
    assert "medians of 2 to 3 alternated runs" in capsys.readouterr().out
    report = json.loads(file.read_text())
    report["machine"]["cpu"] = "another"
    file.write_text(json.dumps(report))
    assert names_after("--only", "cross entropy, frozen") == [("cross entropy, frozen head", 5)]


def _measured(name, rounds):
    return {"name": name, "unit": "tokens", "contestants": {}, "without": {}, "rounds": rounds}


def trained(**changes):
    checks = {"gradient norm": 1.0, "change of the parameters": 0.1} | changes
    return {"equal": {"first loss": checks.pop("loss", 2.0)}, "positive": checks}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"gradient norm": 0.0}, "gradient norm is 0.0"),
        ({"gradient norm": float("nan")}, "gradient norm is nan"),
        ({"change of the parameters": 0.0}, "change of the parameters is 0.0"),
        ({"loss": 2.2}, "first loss is 2.2, transformers has 2"),
        ({"loss": float("nan")}, "first loss is nan"),
    ],
)
def test_a_contestant_that_did_not_train_is_refused(wrong, reason):
    found = harness.refused({"tt": trained(**wrong), "transformers": trained()}, 0.02)
    assert list(found) == ["tt"]
    assert reason in found["tt"]


def test_contestants_that_trained_alike_are_not_refused():
    assert harness.refused({"tt": trained(loss=2.01), "transformers": trained()}, 0.02) == {}


def test_a_contestant_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ask", lambda *_: {"cpu_s": 1.0, "wall_s": 1.0, "work": 1} | trained())
    cell = Cell(name="x", workload="train", request={}, contestants={"tt": {}, "litgpt": {}}, inputs=())
    found = harness.measure(cell, 1, tmp_path, {"tt": sys.executable, "litgpt": None}.get)
    assert found["without"] == {"litgpt": "missing: its environment is not installed"}
    assert list(found["contestants"]) == ["tt"]
    assert "litgpt | missing: its environment is not installed" in tables.table(_report([found]))


def test_each_run_has_a_cache_of_its_own(tmp_path, monkeypatch):
    seen = []

    def run(*_, env, **__):
        seen.append(env["HF_DATASETS_CACHE"])
        return SimpleNamespace(returncode=0, stdout='{"cpu_s": 1.0, "wall_s": 1.0, "work": 1}\n', stderr="")

    monkeypatch.setattr(harness.subprocess, "run", run)
    cell = Cell(name="x", workload="data", request={}, contestants={"trl": {}}, inputs=())
    harness.measure(cell, 2, tmp_path, lambda _: sys.executable)
    assert len({folder for folder in seen if folder.startswith(str(tmp_path))}) == 2


def test_an_environment_is_not_made_if_that_is_not_wanted(tmp_path):
    options = Namespace(python=[], envs=tmp_path, no_build=True)
    assert harness.interpreter("torchtune", options) is None
    assert harness.interpreter("tt", options) == sys.executable
    options.python = ["torchtune=/a/python"]
    assert harness.interpreter("torchtune", options) == "/a/python"


def _report(cells):
    when = {"commit": "c", "date": "d", "rounds": 2, "load_average": [1, 1]}
    machine = {"cpu": "A", "features": [], "torch": "2"}
    return {"suite": "cpu", "quick": False, "machine": machine, "cells": [cell | when for cell in cells]}


def test_a_summary_has_the_lowest_cell_and_the_geometric_mean():
    def cell(name, own, other):
        answers = {"tt": [{"cpu_s": 1 / own, "wall_s": 1, "work": 1, "peak_mb": 50}] * 2,
                   "trl": [{"cpu_s": 1 / other, "wall_s": 1, "work": 1, "peak_mb": 100}] * 2}  # fmt: skip
        return harness.summary(Cell(name=name, workload="train", request={}, contestants={}), answers, {})

    made = tables.summary([_report([cell("fast", 4, 1), cell("slow", 0.5, 0.5)])])
    assert "| cpu | A | 2 | 2.00 | 1.00 (slow; trl) | 0.50, at most 0.50 |" in made


def test_pages_have_the_tables_that_the_results_give():
    assert tables.pages()
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page.name}: run nox -s bench -- --tables"


def test_every_contestant_of_every_cell_has_the_workload():
    defined = {
        file.stem: {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        for file in ROOT.glob("benchmarks/contestants/*.py")
    }
    for suite in SUITES:
        cells = cells_of(suite, quick=False)
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            for label in cell.contestants:
                assert label.split()[0] in harness.HOME
                assert cell.workload == "command" or cell.workload in defined[label.split()[0]], (cell.name, label)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_says_what_it_needs(capsys):
    assert harness.main(["--suite", "gpu"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_every_cell_for_a_gpu_trains_at_a_small_size_on_the_cpu(tmp_path):
    from contestants import tt

    for cell in cells_of("gpu", quick=True):
        if cell.request.get("compile"):  # a compiler takes longer than all the rest
            cell.request["compile"] = False
        inputs = harness.prepare(cell, tmp_path)
        request = cell.request | inputs | {"device": "cpu", "scratch": str(tmp_path), "steps": 1}
        found = getattr(tt, cell.workload)(request)()
        assert harness.refused({"tt": found}, 0.0) == {}, cell.name
    assert QUICK["shape"] == "tiny"
