"""Starting values of adapters, drawn from torch's global generator in the order of the modules.

PiSSA: https://arxiv.org/abs/2404.02948.
"""

import torch
from torch import Tensor, nn

from tt_peft.full_modules import SavedModule, copy_from_base_
from tt_peft.lora import LoRAEmbedding, LoRALinear
from tt_peft.lowrank import AdapterModule, LowRank, assign_, low_ranks, normal, principal_factors, row_norms, whole
from tt_peft.nf4 import dense, is_nf4
from tt_peft.switch import modules_of


def init_adapter_(model: nn.Module, adapter: str = "default") -> None:
    """Set the starting values of an adapter; parameters on the meta device are made where their base weight is.

    ``apply_lora_`` does this by itself, except on a model on the meta device: there, load the base weights first and
    call this then. The values depend on torch's global generator alone (``torch.manual_seed``): not on device, dtype
    or sharding.
    """
    for name, module in modules_of(model, adapter).items():
        materialise_(name, module, adapter)
        if isinstance(module, SavedModule):
            copy_from_base_(module, adapter)
        for low_rank in low_ranks(module, adapter).values():
            start_(name, module, low_rank)


def materialise_(name: str, module: AdapterModule, adapter: str) -> None:
    """Give an adapter on the meta device memory on its base's device."""
    part = module.adapters[adapter]
    if any(p.is_meta for p in part.parameters()):
        base = next(p for p in module.parameters(recurse=False)) if not isinstance(module, SavedModule) else None
        base = base if base is not None else next(iter(module.parameters()))
        if base.is_meta:
            raise ValueError(f"{name} is on the meta device: load the base weights before the adapter's values")
        part.to_empty(device=base.device)


@torch.no_grad()
def start_(name: str, module: AdapterModule, low_rank: LowRank) -> None:
    """Set the values of one pair of factors (and DoRA's magnitude: the norms of the base's rows)."""
    init = low_rank.spec.config.init
    if init == "loftq" and is_nf4(module.get_parameter("weight")):
        if not low_rank.started:
            raise ValueError(
                f"{name} was NF4 before: init='loftq' needs the dense weight, so quantize with this adapter"
            )
        return
    values = _special_start(module, low_rank)
    if values is None:
        low_rank.reset_parameters()
    else:
        assign_(low_rank.lora_A, values[0])
        assign_(low_rank.lora_B, values[1])
        if low_rank.start_A is not None and low_rank.start_B is not None:
            assign_(low_rank.start_A, values[0])
            assign_(low_rank.start_B, values[1])
    if low_rank.lora_magnitude_vector is not None:
        weight = whole(dense(module.get_parameter("weight")))
        assign_(low_rank.lora_magnitude_vector, row_norms(weight, low_rank))
    low_rank.started = True


def _special_start(module: AdapterModule, low_rank: LowRank) -> tuple[Tensor, Tensor] | None:
    """A and B where they do not start as usual."""
    shape_A, shape_B = low_rank.lora_A.shape, low_rank.lora_B.shape
    config, rank = low_rank.spec.config, low_rank.spec.rank
    if isinstance(module, LoRAEmbedding):
        return torch.zeros(shape_A), normal(shape_B, 1.0)
    if config.init == "gaussian":
        return normal(shape_A, 1.0 / rank), torch.zeros(shape_B)
    if config.init in ("pissa", "loftq") and isinstance(module, LoRALinear):
        return principal_factors(whole(dense(module.weight)), rank, low_rank.spec.scaling)
    return None
