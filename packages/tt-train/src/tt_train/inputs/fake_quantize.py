"""Quantization-aware training: linear layers compute with weights rounded as they will be stored, by torchao.

https://arxiv.org/abs/1712.05877. The parameters stay what they are, under their names: what is saved is a normal
checkpoint, and quantizing it is a separate step (``tt quantize``).
"""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tt_peft import NF4Linear, QLoRALinear
from tt_peft.full_modules import SavedModule
from tt_peft.lora import LoRALinear
from tt_train.config import QuantizationSection
from tt_train.errors import counted
from tt_train.memory import blocks
from tt_train.quantized.torchao import roundings, trained_config

Rounding = Callable[[Tensor], Tensor]


def fake_quantize_(model: nn.Module, section: QuantizationSection) -> list[str]:
    """Let every linear layer of the blocks compute with rounded weights and, if asked for, inputs, in place.

    The gradient passes the rounding as if it were not there. Of an adapted layer, the sum of weight and adapter is
    rounded: what ``tt merge`` writes. Embeddings and output projection stay as they are. Returns the layers' names.

    Raises:
        ValueError: layers that cannot be rounded so, with their names.
    """
    if problems := quantization_mistakes(model, section):
        raise ValueError("\n".join(problems))
    config, layers = trained_config(section), linear_layers(model)
    for layer in layers.values():
        weights, inputs = roundings(config, layer.in_features, layer.out_features)
        layer.forward = functools.partial(_rounded, layer, weights, inputs)  # type: ignore[method-assign]
    return list(layers)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name, adapted or not; of one that is trained in full beside an adapter, the
    copy that trains."""
    return {
        f"model.layers.{index}.{name}": module
        for index, block in enumerate(blocks(model))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, SavedModule)
    }


def quantization_mistakes(model: nn.Module, section: QuantizationSection) -> list[str]:
    """Why ``model``, which may be on the meta device, cannot be rounded as ``section`` says, a line for each reason."""
    found, layers = [], linear_layers(model)
    size = section.group_size
    uneven = [name for name, layer in layers.items() if size is not None and layer.in_features % size]
    if uneven:
        widths = sorted({layers[name].in_features for name in uneven})
        fitting = [g for g in (256, 128, 64, 32, 16, 8) if all(layer.in_features % g == 0 for layer in layers.values())]
        cure = f"take {', '.join(map(str, fitting))}" if fitting else "set it to null: one scale for each row"
        found.append(
            f"quantization.group_size: {size} does not divide the inputs ({', '.join(map(str, widths))}) of "
            f"{counted(len(uneven), 'layer')}, such as {uneven[0]}, which would not be rounded; {cure}"
        )
    if any(isinstance(layer, NF4Linear | QLoRALinear) for layer in layers.values()):
        found.append("adapter.quantize_base: the base would be rounded to NF4, and not stored so; set it to false")
    adapters = [a for layer in layers.values() if isinstance(layer, LoRALinear) for a in layer.active_adapters()]
    if any(adapter.spec.config.dropout for adapter in adapters):
        found.append(
            "adapter.dropout: the sum of weight and adapter is rounded, which leaves no place for it; set it to 0"
        )
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() > 2]
    if stacked:
        found.append(f"model: {stacked[0]} is not a linear layer; qat does not support stacked experts")
    return found


def _rounded(layer: nn.Linear, weights: Rounding, inputs: Rounding | None, x: Tensor) -> Tensor:
    weight = layer.effective_weight() if isinstance(layer, LoRALinear) else layer.weight
    return F.linear(x if inputs is None else inputs(x), weights(weight), layer.bias)
