"""The traces of nox -s gpu-trace run: here on the CPU, since this torch may have no CUDA."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_traces_run_on_a_device_of_this_machine():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / "gpu_trace")]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TT_TRACE_DEVICE": "cpu"})
    assert ran.returncode == 0, ran.stdout
    assert "skipped" not in ran.stdout
