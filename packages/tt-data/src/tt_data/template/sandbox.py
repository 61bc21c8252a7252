"""Processes that work on untrusted files: with nothing of ours to see, and with limits that they set themselves."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from typing import TypeAlias

_resource = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows
HAS_LIMITS = _resource is not None
Process: TypeAlias = "subprocess.Popen[bytes]"


def bare_environment() -> dict[str, str]:
    """What such a process may see of our environment: no tokens, no keys."""
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "TZ", "LD_LIBRARY_PATH") if key in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUTF8": "1"}


def start(module: str, *words: str) -> Process:
    """``python -m module words`` with pipes to its stdin and from its stdout."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=bare_environment(),
    )  # fmt: skip


def run(module: str, *words: str, data: bytes, seconds: float) -> tuple[bytes, int]:
    """What the process wrote when it was given ``data``, and its exit status. It is killed after ``seconds``."""
    process = start(module, *words)
    try:
        written, _ = process.communicate(data, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        written, _ = process.communicate()
    return written, process.returncode


# ---- in the process ----------------------------------------------------------------------------------------------


def limit_memory(size: int) -> None:
    """This process fails when it needs more than ``size`` bytes of addresses. It writes no core dump."""
    if _resource is not None:
        hard = _resource.getrlimit(_resource.RLIMIT_AS)[1]
        limit = size if hard == _resource.RLIM_INFINITY else min(size, hard)
        _resource.setrlimit(_resource.RLIMIT_AS, (limit, hard))
        _resource.setrlimit(_resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """The system ends this process after that many more seconds of CPU time, rounded up; 0: no limit."""
    if _resource is not None:
        hard = _resource.getrlimit(_resource.RLIMIT_CPU)[1]
        last = math.ceil(time.process_time() + seconds)
        _resource.setrlimit(_resource.RLIMIT_CPU, (last if seconds else hard, hard))
