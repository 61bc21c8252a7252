"""An adapter's tensors under the names that PEFT files have, without their ``base_model.model.`` prefix."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tt_peft.apply import materialise_
from tt_peft.full_modules import SavedModule
from tt_peft.lora import LoRAEmbedding
from tt_peft.lowrank import AdapterModule, assign_, is_sharded, low_ranks
from tt_peft.stacked import StackedLoRA
from tt_peft.switch import modules_of

Layout = Literal["plain", "stacked_A", "stacked_B"]


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter: its name in files, its parameter, and how the file lays it out."""

    key: str
    parameter: nn.Parameter
    layout: Layout = "plain"

    def to_file(self, tensor: Tensor | None = None) -> Tensor:
        tensor = self.parameter.detach() if tensor is None else tensor
        if self.layout == "stacked_A":  # [experts, rank, in] -> [experts * rank, in]
            return tensor.reshape(-1, tensor.shape[-1])
        if self.layout == "stacked_B":  # [experts, out, rank] -> [out, rank * experts]
            return tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1)
        return tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        shape = self.parameter.shape
        if self.layout == "stacked_A":
            return tensor.reshape(shape)
        if self.layout == "stacked_B":
            return tensor.reshape(shape[1], shape[2], shape[0]).permute(2, 0, 1)
        return tensor

    def file_shape(self) -> list[int]:
        return list(self.to_file(torch.empty(self.parameter.shape, device="meta")).shape)


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter, by name; of a sharded model, its shards."""
    return {entry.key: entry.to_file() for entry in entries(model, adapter)}


@torch.no_grad()
def load_adapter_state_(model: nn.Module, state: Mapping[str, Tensor], *, adapter: str = "default") -> None:
    """The inverse of ``adapter_state_dict``: set every tensor of an adapter that the model has."""
    own = {entry.key: entry for entry in entries(model, adapter)}
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} has shape {list(state[key].shape)}, expected {entry.file_shape()}"
        for key, entry in own.items()
        if key in state and list(state[key].shape) != entry.file_shape()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the adapter does not fit this model: {'; '.join(problems[:3])}{more}")
    for name, module in modules_of(model, adapter).items():
        materialise_(name, module, adapter)
        for low_rank in low_ranks(module, adapter).values():
            low_rank.started = True
    for entry in entries(model, adapter):
        given = state[entry.key]
        if is_sharded(given):
            entry.parameter.copy_(given)
        else:
            assign_(entry.parameter, entry.from_file(given))


def entries(model: nn.Module, adapter: str) -> Iterator[Entry]:
    """Every tensor of an adapter, in the model's order."""
    for name, module in modules_of(model, adapter).items():
        if isinstance(module, StackedLoRA):
            yield from _stacked_entries(name, module, adapter)
        elif isinstance(module, SavedModule):
            for local, parameter in module.adapters[adapter].named_parameters():
                yield Entry(f"{name}.{local}", parameter)
        else:
            for low_rank in low_ranks(module, adapter).values():
                for local, parameter in low_rank.named_parameters():
                    yield Entry(f"{name}.{_file_name(module, local)}", parameter)


def _file_name(module: AdapterModule, local: str) -> str:
    if isinstance(module, LoRAEmbedding):
        return local.replace("lora_", "lora_embedding_")
    return local if local == "lora_magnitude_vector" else f"{local}.weight"


def _stacked_entries(name: str, module: StackedLoRA, adapter: str) -> Iterator[Entry]:
    """PEFT wraps a module once for each parameter in the module's order; the last wrapper is the outermost."""
    parts = low_ranks(module, adapter)
    order = [local for local, _ in module.named_parameters(recurse=False) if local in parts]
    for depth, local in enumerate(reversed(order)):
        prefix = name + ".base_layer" * depth
        yield Entry(f"{prefix}.lora_A.weight", parts[local].lora_A, "stacked_A")
        yield Entry(f"{prefix}.lora_B.weight", parts[local].lora_B, "stacked_B")
