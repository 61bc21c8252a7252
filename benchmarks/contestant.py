"""A measured process: ``python benchmarks/contestant.py NAME REQUEST`` runs a workload of contestants/NAME.py.

It prints one line of JSON; what libraries print goes to stderr. ``missing`` names a module that is not installed.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import warnings
from typing import Any

from measured import timed

PACKAGES = ("torch", "torchao", "transformers", "peft", "trl", "bitsandbytes", "torchtune", "litgpt", "lm_eval",
            "tokenizers", "datasets", "safetensors")  # fmt: skip


def answer(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """What this process says; ``missing`` names the module that is not installed."""
    import torch

    torch.set_num_threads(request.get("threads", 1))
    warnings.simplefilter("ignore")
    try:
        run = getattr(importlib.import_module(f"contestants.{name}"), request["workload"])(request)
    except ImportError as error:
        return {"missing": str(error)}
    found = timed(run)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES if package in sys.modules}
    return found | {"versions": versions, "capability": torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not the answer
    found = answer(sys.argv[1], json.loads(sys.argv[2]))
    os.write(stdout, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main()
