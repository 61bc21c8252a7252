"""What may be built: the limits of a config's numbers, and the memory of the machine.

The limits are far above every published model. A process that runs out of memory is killed without a message, so what
needs more than the machine has is refused before.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tt_models.shown import shown

# field -> the least and the largest value, and the largest published one
LIMITS: dict[str, tuple[float, float, float]] = {
    "vocab_size": (1, 2**24, 262_208),
    "hidden_size": (1, 2**18, 20_480),
    "intermediate_size": (1, 2**21, 53_248),
    "moe_intermediate_size": (1, 2**21, 32_768),
    "num_hidden_layers": (1, 1024, 126),
    "num_attention_heads": (1, 2**14, 128),
    "num_key_value_heads": (1, 2**14, 128),
    "head_dim": (1, 2**15, 512),
    "max_position_embeddings": (1, 2**30, 10_485_760),
    "original_max_position_embeddings": (1, 2**30, 262_144),
    "sliding_window": (1, 2**31, 262_144),
    "num_experts": (1, 2**14, 512),
    "num_local_experts": (1, 2**14, 512),
    "num_experts_per_tok": (1, 2**14, 22),
    "max_window_layers": (0, 2**31, 100),
    "sliding_window_pattern": (1, 2**31, 6),
    "no_rope_layer_interval": (1, 2**31, 4),
    "decoder_sparse_step": (1, 2**31, 2),
    "rope_theta": (2, 1e15, 5e10),
    "rope_local_base_freq": (2, 1e15, 1e4),
    "partial_rotary_factor": (1e-4, 1, 1),
    "query_pre_attn_scalar": (1e-6, 1e9, 256),
    "attn_logit_softcapping": (1e-6, 1e9, 50),
    "final_logit_softcapping": (1e-6, 1e9, 30),
    "rms_norm_eps": (0, 1, 1e-3),
    "initializer_range": (0, 1e3, 1),
    "attention_dropout": (0, 1, 0.1),
    "router_aux_loss_coef": (0, 1e6, 1),
    "swiglu_alpha": (0, 1e6, 1.702),
    "swiglu_limit": (1e-6, 1e6, 7),
    "pad_token_id": (-(2**31), 2**31, 262_144),
    "bos_token_id": (-(2**31), 2**31, 262_144),
    "eos_token_id": (-(2**31), 2**31, 262_144),
}
# numbers of rope_scaling
ROPE_LIMITS: dict[str, tuple[float, float, float]] = {
    "original_max_position_embeddings": (2, 2**30, 262_144),
    "low_freq_factor": (0, 1e9, 1),
    "mscale": (0, 1e9, 1),
    "mscale_all_dim": (0, 1e9, 1),
}
ROPE_LIMIT = (1e-9, 1e9, 128)
MOST_EXPERTS = 2**18  # of all layers; the largest published model has some 25,000
LONGEST_LIST = 2**16
MOST_KEYS = 4096
LONGEST_KEY = 200

_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def out_of_range(name: str, value: Any, limits: tuple[float, float, float]) -> str | None:
    """What is wrong with a number, with the range expected; None if nothing is."""
    least, most, published = limits
    if least <= value <= most:
        return None
    expected = f"expected {_number(least)} to {_number(most)}"
    if value < 0 or (value == 0 and least > 0):
        must = "must not be negative" if least == 0 else "must be positive"
        return f"{name} {must}, got {shown(value)}: {expected}"
    return f"{name} is out of range, got {shown(value)}: {expected} (the largest published is {_number(published)})"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def total_memory(device: torch.device) -> int | None:
    """All memory of a device in bytes, used or free (with swap, within the control group); None if unknown."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device.type).get_device_properties(device).total_memory)
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
    for file in _CONTROL_GROUPS:
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # it is missing, or "max"
            continue
    return limits


def weight_bytes(model: nn.Module) -> int:
    """The size of a model's parameters, each counted once; on the meta device, the size that they will have."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def refuse_too_large(what: str, nbytes: int, device: torch.device, cure: str) -> None:
    """ValueError if ``nbytes`` is more than all memory of the device."""
    total = total_memory(device)
    if total is not None and nbytes > total:
        place = "this machine" if device.type == "cpu" else str(device)
        raise ValueError(f"{what} needs {gigabytes(nbytes)}, {place} has {gigabytes(total)}; {cure}")


def gigabytes(nbytes: int) -> str:
    """In GB of 10**9 bytes, or TB."""
    return f"{nbytes / 1e12:,.1f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.1f} GB"
