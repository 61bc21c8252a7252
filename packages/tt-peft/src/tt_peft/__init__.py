"""LoRA, QLoRA and DoRA on any ``nn.Module``, in place; merge; PEFT adapter files both ways."""

from tt_peft.adapter_files import adapter_config, load_adapter, save_adapter
from tt_peft.apply import (
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    apply_lora_,
    disable_adapter,
    load_adapter_state_,
    set_adapter_,
)
from tt_peft.config import LoRAConfig
from tt_peft.initial import init_adapter_
from tt_peft.lora import LoRAEmbedding, LoRALinear
from tt_peft.merge import merge_lora_

__version__ = "0.1.0"

__all__ = [
    "LoRAConfig",
    "apply_lora_",
    "init_adapter_",
    "adapter_parameters",
    "adapter_state_dict",
    "load_adapter_state_",
    "save_adapter",
    "load_adapter",
    "adapter_config",
    "adapter_names",
    "set_adapter_",
    "merge_lora_",
    "disable_adapter",
    "LoRALinear",
    "LoRAEmbedding",
]
