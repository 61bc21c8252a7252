"""What runs on this machine, found by quantizing a small layer and computing with it."""

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import nn

from tt_train.quantized.formats import FORMATS
from tt_train.quantized.torchao import dense, described, quantized, quietly, runnable

_SIZE, _GROUP = 64, 32
_FAR = 0.5  # of the norm of the right result: 4-bit weights miss it by a tenth, a kernel that is wrong by more


class Trial(TypedDict):
    """A row of ``tt quantize --list``; ``problem`` is None if the format runs."""

    format: str
    about: str
    runs: bool
    problem: str | None


def trials(device: torch.device) -> list[Trial]:
    """Every format, tried on ``device``."""
    rows = []
    for name, found in FORMATS.items():
        problem = format_problem(name, device)
        rows.append(Trial(format=name, about=found.about, runs=problem is None, problem=problem))
    return rows


@torch.no_grad()
def format_problem(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why a layer in this format cannot be made, stored or used on ``device``; None if it can."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SIZE, _SIZE, generator=generator).to(device, dtype)
    try:
        made = quantized(weight, name, _GROUP if FORMATS[name].grouped else None)
        described(made)
        layer = nn.Linear(_SIZE, _SIZE, bias=False, device="meta")
        layer.weight = nn.Parameter(runnable(made), requires_grad=False)
        problem = computing_problem(layer, dtype, device)
        if problem is None:
            x = torch.randn(2, _SIZE, generator=generator).to(device, dtype)
            right = F.linear(x.float(), dense(made))
            problem = None if _near(layer(x).float(), right) else "its kernel gives wrong results"
    except Exception as error:  # whatever a library says about this machine
        return _reason(error)
    return problem


@torch.no_grad()
def computing_problem(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a quantized layer that has been loaded cannot compute on ``device``; None if it can."""
    x = torch.ones(1, int(layer.in_features), dtype=dtype, device=device)  # type: ignore[arg-type]
    try:
        with quietly():
            finite = bool(torch.isfinite(layer(x)).all())
    except Exception as error:  # whatever a library says about this machine
        kind = type(layer.get_parameter("weight")).__name__
        return f"{kind}: not computed on this machine ({_reason(error)}); tt quantize --list shows what is"
    return None if finite else "a quantized layer gives values that are not finite"


def _near(found: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((found - right).norm() < _FAR * right.norm())


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
