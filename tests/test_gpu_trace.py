"""The traces of nox -s gpu-trace run: here some of them on the CPU, since this torch may have no CUDA."""

import os
import subprocess
import sys
from pathlib import Path

SOME = "gpt_oss_20b-qlora or kto-frozen-packed or full-selective or adamw-True-True or elsewhere or gives or formula"
SOME += " or full-hsdp-checkpointed or copies"


def test_the_traces_run_on_a_device_of_this_machine():
    folder = str(Path(__file__).parent / "gpu_trace")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", SOME, folder]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TT_TRACE_DEVICE": "cpu"})
    assert ran.returncode == 0, ran.stdout
    assert "9 passed" in ran.stdout
    assert "skipped" not in ran.stdout
