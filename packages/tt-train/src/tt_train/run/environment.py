"""What a run ran on: versions and devices. No program is started to find out."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tt_train.redact import redact

PACKAGES = (
    "tt-models",
    "tt-peft",
    "tt-data",
    "tt-ckpt",
    "tt-train",
    "tt-cli",
    "torch",
    "torchao",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "huggingface_hub",
    "omegaconf",
    "transformers",
    "peft",
)


def collect() -> dict[str, Any]:
    """Versions, devices and settings as plain data, for ``tt env`` and a run's manifest; no value of any secret."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": " ".join((platform.system(), platform.release(), platform.machine())),
        "packages": versions(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "variables": {
            name: redact(os.environ[name])
            for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE")
            if name in os.environ
        },
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def versions() -> dict[str, str]:
    """The installed version of each package that matters; absent ones are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command that started this process, as a user would type it."""
    import shlex

    program = Path(sys.argv[0])
    name = "python -m " + program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([*name.split(), *sys.argv[1:]])
