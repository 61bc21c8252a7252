"""Starting values of adapters, drawn from torch's global generator in the order of the modules."""

import math

import torch
from torch import Tensor, nn

from tt_peft.lora import AdapterModule, LoRAEmbedding, LoRALinear, LowRank


def init_adapter_(model: nn.Module, adapter: str = "default", *, device: torch.device | str | None = None) -> None:
    """Draw the starting values of an adapter; parameters on the meta device are made on that of their base weight.

    ``apply_lora_`` does this by itself, except on a model on the meta device: there, load the base weights first and
    call this then. The values depend on torch's global generator alone (``torch.manual_seed``), not on the device.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule) and adapter in module.adapters:
            low_rank = module.adapters[adapter]
            assert isinstance(low_rank, LowRank)
            weight = module.get_parameter("weight")
            if weight.is_meta and device is None:
                raise ValueError(f"{name}.weight is on the meta device: load the base weights before init_adapter_")
            low_rank.to_empty(device=device or weight.device)
            _draw_(module, low_rank)


@torch.no_grad()
def _draw_(module: nn.Module, low_rank: LowRank) -> None:
    if isinstance(module, LoRAEmbedding):
        low_rank.lora_A.zero_()
        low_rank.lora_B.copy_(_normal(low_rank.lora_B.shape, 1.0))
        return
    assert isinstance(module, LoRALinear)
    low_rank.lora_B.zero_()
    if low_rank.spec.config.init == "gaussian":
        low_rank.lora_A.copy_(_normal(low_rank.lora_A.shape, 1.0 / low_rank.spec.rank))
    else:
        low_rank.lora_A.copy_(_uniform(low_rank.lora_A.shape, 1.0 / math.sqrt(module.in_features)))


def _uniform(shape: torch.Size, bound: float) -> Tensor:
    """In fp32 on the CPU whatever the model's device and dtype, so that a seed means the same values everywhere."""
    return torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound)


def _normal(shape: torch.Size, std: float) -> Tensor:
    return torch.empty(shape, device="cpu", dtype=torch.float32).normal_(0.0, std)
