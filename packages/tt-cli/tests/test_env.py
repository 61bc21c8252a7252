"""``tt env``: a block to paste, without secrets, and what is wrong with the machine."""

import copy
import importlib.metadata
import typing
from pathlib import Path

import pytest

from tt_cli.verbs import env
from tt_models.cpu import attention, blocks, products

GIB = 2**30


@pytest.fixture(scope="module")
def machine():
    return env.collect()


@pytest.fixture
def facts(machine):
    """A machine without problems."""
    sound = {"cuda": "12.6", "nvidia_driver": None, "amd_gpu": False, "accelerators": [], "torch_threads": 2,
             "cpu_usable": 2.0, "cpu_load": 2.0, "variables": {},
             "disk": {"here": 99 * GIB, "hub_cache": 99 * GIB, "temporary": 99 * GIB},
             "memory": {"total": 8 * GIB, "available": 6 * GIB, "container_limit": None, "shared": GIB}}  # fmt: skip
    return {**copy.deepcopy(machine), **sound}


def problems(facts) -> list[str]:
    checks = (env.gpu, env.disk, env.memory, env.threads)
    return [problem for check in checks for problem in check(facts)]


@pytest.mark.parametrize(("change", "said"), [
    ({}, None),
    ({"nvidia_driver": "550.54.14", "accelerators": ["a card"]}, None),
    ({"nvidia_driver": "550.54.14", "cuda": None}, "an NVIDIA GPU is here (driver 550.54.14), but torch"),
    ({"nvidia_driver": "470.82", "cuda": "12.6"}, "the NVIDIA driver 470.82 is too old for CUDA 12.6"),
    ({"nvidia_driver": "550.54", "cuda": "13.0"}, "needs 580 or newer"),
    ({"nvidia_driver": "590.1", "cuda": "13.0"}, "finds none; try nvidia-smi"),
    ({"nvidia_driver": "590.1", "variables": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES hides every GPU"),
    ({"amd_gpu": True}, "an AMD GPU is here"),
    ({"disk": {"here": 5 * GIB, "hub_cache": 99 * GIB}}, "only 5.4 GB are free in this folder"),
    ({"disk": {"here": None, "hub_cache": GIB}}, "are free for the hub's cache"),
    ({"memory": {"available": GIB, "shared": None}}, "of memory are available; close other programs"),
    ({"memory": {"available": 9 * GIB, "shared": 2**26}}, "data.num_workers needs more (docker run --shm-size=1g)"),
    ({"torch_threads": 64}, "torch uses 64 threads on 2 CPUs, which is slower; set OMP_NUM_THREADS=2"),
    ({"torch_threads": 1, "cpu_usable": 0.5}, None),
    ({"cpu_load": 2.4}, "the load is 2.4 on 2 CPUs, and torch's waiting threads spin; set OMP_WAIT_POLICY=PASSIVE"),
    ({"cpu_load": 2.4, "torch_threads": 1}, None),
    ({"cpu_load": 2.4, "variables": {"OMP_WAIT_POLICY": "PASSIVE"}}, None),
    ({"cpu_load": None}, None),
])  # fmt: skip
def test_what_is_wrong_is_said_with_the_cure(facts, change, said):
    found = problems({**facts, **change})
    assert len(found) == (said is not None), found
    assert said is None or said in found[0]


@pytest.mark.parametrize("kernel", typing.get_args(products.Kernel))
def test_how_weights_are_read_in_decoding_is_said(kernel, monkeypatch):
    monkeypatch.setattr(products, "kernel", lambda: kernel)
    found = env.collect()["kernels"]
    assert found["decode"] == env.DECODING[kernel]
    assert found["tiles"] == bool(attention.FASTER_IN)
    assert found["block"] == blocks.BLOCK
    assert found["fp32"] == ("oneDNN" if products.BY_ONEDNN else "as torch")


def test_a_cache_that_cannot_be_written_is_a_problem(facts, tmp_path, monkeypatch):
    monkeypatch.setattr(env, "_cache", lambda: tmp_path / "hub")
    assert list(env.cache(facts)) == []
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written; set HF_HOME to a folder of yours" in next(env.cache(facts))
    (tmp_path / "hub").write_text("")
    assert "is a file; set HF_HOME to a folder" in next(env.cache(facts))


def test_wheels_that_do_not_fit_each_other_are_named(facts, monkeypatch):
    needs = {
        "torchvision": ["torch==1.0", "numpy; extra == 'x'", "not a requirement ?"],
        "peft": ["a-package-of-nobody>1"],
    }

    def requires(name: str) -> list[str]:
        if name not in needs:
            raise importlib.metadata.PackageNotFoundError
        return needs[name]

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    here = importlib.metadata.version("torch")
    assert list(env.wheels(facts)) == [
        f"torchvision needs torch==1.0, but {here} is installed; pip install 'torch==1.0'",
        "peft needs a-package-of-nobody>1, which is not installed; pip install 'a-package-of-nobody>1'",
    ]


def test_an_endpoint_that_would_see_the_token_in_plain_is_a_problem(facts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://far.example")
    monkeypatch.setenv("HF_ENDPOINT", "http://far.example")
    assert any("expected https" in problem for problem in env.endpoint(facts))


def test_the_block_has_what_matters_and_no_secret(tt, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:staple@127.0.0.1:9")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_HOME", str(Path.home() / "models"))
    answer = tt("env")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    for part in ("packages.torch ", "cpu_flags", "disk.here", "memory.available", "variables.NCCL_DEBUG", "[set]",
                 "~/models", "found"):  # fmt: skip
        assert part in answer.out
    assert "correct-horse" not in answer.out
    assert "staple" not in answer.out
    assert str(Path.home()) not in answer.out or str(Path.home()) == "/"


def test_the_problems_are_in_json(tt, monkeypatch):
    monkeypatch.setattr(env, "CHECKS", (lambda _: iter(["a", "b"]),))
    assert tt("env", "--json").json["checks"] == {"passed": False, "problems": ["a", "b"]}
    assert "problem: a\nproblem: b\n2 problems found" in tt("env").out
