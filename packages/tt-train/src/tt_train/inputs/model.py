"""How much memory a run needs at least, told before anything is loaded."""

import torch
from torch import nn

from tt_models.limits import gigabytes, refuse_too_large, total_memory
from tt_peft import NF4Linear, QLoRALinear
from tt_train.config import RunConfig
from tt_train.errors import ConfigError

NF4_BYTES = 0.5 + 1 / 64  # of a value: its four bits, and the scale of its block
STATE_BYTES = 16  # of a value that trains: weight, gradient and AdamW's two moments in fp32


def check_memory(model: nn.Module, config: RunConfig, device: torch.device | None, notes: list[str]) -> None:
    """ConfigError if the weights alone of ``model`` (on the meta device) are more than the device has in all; a note if
    what trains takes more with its gradients and AdamW's moments."""
    if device is None:
        return
    quantized = {id(m.weight) for m in model.modules() if isinstance(m, NF4Linear | QLoRALinear)}
    width = 2 if config.model.dtype == "bf16" else 4
    frozen = trained = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel() * (NF4_BYTES if id(parameter) in quantized else width)
    count = sum(parameter.numel() for parameter in model.parameters())
    cure = "take a smaller model"
    if config.adapter is None:
        cure = f"train an adapter (adapter.rank=8) or {cure}"
    elif not config.adapter.quantize_base:
        cure = f"set adapter.quantize_base=true, lower adapter.rank or {cure}"
    try:
        refuse_too_large(
            f"a model of {count:,} parameters (its weights alone)", int(frozen + 4 * trained), device, cure
        )
    except ValueError as error:
        raise ConfigError([f"model: {error}"]) from None
    about, total = int(frozen + STATE_BYTES * trained), total_memory(device)
    if total is not None and about > total:
        notes.append(
            f"memory: weights, gradients and AdamW's state take about {gigabytes(about)}, {device} has "
            f"{gigabytes(total)}; {cure}"
        )
