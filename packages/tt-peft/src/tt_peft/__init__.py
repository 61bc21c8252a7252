"""LoRA, QLoRA and DoRA on any ``nn.Module``, in place; merge; PEFT adapter files both ways."""

from tt_peft.adapter_files.folder import load_adapter, save_adapter
from tt_peft.adapter_files.state import adapter_state_dict, load_adapter_state_
from tt_peft.apply import apply_lora_, init_adapter_
from tt_peft.config import LoRAConfig
from tt_peft.dora import DoRALinear, QDoRALinear
from tt_peft.lora import LoRAEmbedding, LoRALinear, QLoRALinear
from tt_peft.merge import LayerLoss, MergeReport, merge_lora_, unmerge_lora_
from tt_peft.nf4 import to_nf4
from tt_peft.nf4_linear import NF4Linear, spread_nf4_
from tt_peft.quantize import dequantize_, quantize_nf4_
from tt_peft.switch import (
    active_adapters,
    adapter_config,
    adapter_names,
    adapter_parameters,
    copy_adapter_,
    disable_adapter,
    lora_plus_groups,
    remove_adapter_,
    set_adapter_,
    use_adapter,
)

__version__ = "0.1.0"

__all__ = [
    "LoRAConfig", "apply_lora_", "init_adapter_", "adapter_parameters", "lora_plus_groups", "adapter_state_dict",
    "load_adapter_state_", "save_adapter", "load_adapter", "adapter_config", "adapter_names", "active_adapters",
    "set_adapter_", "remove_adapter_", "copy_adapter_", "disable_adapter", "use_adapter", "merge_lora_",
    "unmerge_lora_", "MergeReport", "LayerLoss", "quantize_nf4_", "dequantize_", "to_nf4", "spread_nf4_", "LoRALinear",
    "LoRAEmbedding", "DoRALinear", "QLoRALinear", "QDoRALinear", "NF4Linear",
]  # fmt: skip
