"""The limits that a process which works on untrusted files sets itself."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time

_resource = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows
HAS_LIMITS = _resource is not None


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
