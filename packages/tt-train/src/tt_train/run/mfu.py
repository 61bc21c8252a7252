"""Model FLOPs utilization: which share of a device's peak the training step uses (PaLM, arXiv:2204.02311, appendix B).

A matrix of N values costs 2N operations per token in the forward pass, 2N for the gradient of its input and, if it
trains, 2N for its own gradient: 6N per token of a full fine-tune, 4N where a frozen base carries an adapter. What
attention adds with the length, and what activation checkpointing computes twice, does not count.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import tt_models
from tt_models.moe import MoE
from tt_train.losses.cross_entropy import IGNORE, Batch

# name of the device -> dense bf16 operations per second, in 1e12, without sparsity; the first row that fits counts
PEAKS: Sequence[tuple[str, float]] = (
    (r"H100 NVL|H200 NVL", 835),  # nvidia.com/en-us/data-center/h100 and /h200 (half of what they give with sparsity)
    (r"H100 PCIe", 756),  # NVIDIA H100 PCIe product brief
    (r"G?H100|G?H200|H800", 989),  # nvidia.com/en-us/data-center/h100 and /h200
    (r"H20\b", 148),  # NVIDIA H20 datasheet
    (r"A100|A800", 312),  # nvidia.com/en-us/data-center/a100
    (r"B200", 2250),  # NVIDIA Blackwell datasheet (HGX B200)
    (r"L40S", 362),  # nvidia.com/en-us/data-center/l40s
    (r"L40\b", 181),  # nvidia.com/en-us/data-center/l40
    (r"A10\b", 125),  # nvidia.com/en-us/data-center/products/a10-gpu
    (r"A30\b", 165),  # nvidia.com/en-us/data-center/products/a30-gpu
    (r"MI300X|MI325X", 1307),  # AMD Instinct MI300X and MI325X data sheets
    (r"MI250X", 191.5),  # AMD Instinct MI250X data sheet: one of its two dies, which is one device to torch
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense operations per second of ``device`` in bf16; None if the table does not know it, or for another dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str) -> float | None:
    return next((peak * 1e12 for pattern, peak in PEAKS if re.search(rf"\b({pattern})", name)), None)


def flops_per_token(model: tt_models.Decoder) -> float | None:
    """Operations per token of a training step; None for a mixture of experts, which uses a part of its weights."""
    if any(isinstance(module, MoE) for module in model.modules()):
        return None
    looked_up = model.model.embed_tokens.weight if model.lm_head is not None else None  # else the output uses it
    frozen = trained = 0
    for parameter in _matrices(model):
        if parameter is not looked_up:
            frozen += 0 if parameter.requires_grad else parameter.numel()
            trained += parameter.numel() if parameter.requires_grad else 0
    return 4.0 * frozen + 6.0 * trained


def _matrices(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.dim() >= 2)


def count_tokens(batch: Batch, *, pad_id: int) -> int:
    """The tokens of the rows of a batch, prompts included, padding at their ends left out."""
    filled: Tensor = (batch["input_ids"] != pad_id) | (batch["labels"] != IGNORE)
    return int(filled.flip(1).cummax(1).values.sum())
