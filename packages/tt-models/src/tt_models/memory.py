"""Whether a machine can hold what is about to be made: a process that runs out is killed without a word."""

import re
from pathlib import Path

import torch
from torch import nn

_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total_memory(device: torch.device) -> int | None:
    """All bytes that the device has, in use or not (of a CPU with swap, within its control group); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        table = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = {key: int(size) * 1024 for key, size in re.findall(r"^(\w+): +(\d+) kB", table, re.MULTILINE)}
    if "MemTotal" not in found:
        return None
    return min([found["MemTotal"] + found.get("SwapTotal", 0), *_group_limits()])


def _group_limits() -> list[int]:
    limits = []
    for file in _GROUPS:
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return limits


def weight_bytes(model: nn.Module) -> int:
    """What the parameters of a model take, each counted once; on the meta device, what they will take."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def refuse_too_large(what: str, nbytes: int, device: torch.device, cure: str) -> None:
    """ValueError if ``nbytes`` are more than all that the device has."""
    total = total_memory(device)
    if total is not None and nbytes > total:
        place = "this machine" if device.type == "cpu" else str(device)
        raise ValueError(f"{what} needs {gigabytes(nbytes)}, {place} has {gigabytes(total)}; {cure}")


def gigabytes(nbytes: int) -> str:
    """In GB of 10**9 bytes, or TB."""
    return f"{nbytes / 1e12:,.1f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.1f} GB"
