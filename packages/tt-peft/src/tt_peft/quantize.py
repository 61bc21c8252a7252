"""A whole model's linear layers to NF4, tensor by tensor, and back."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from tt_peft.dora import DoRALinear, QDoRALinear
from tt_peft.full_modules import SavedModule
from tt_peft.lora import LoRALinear, QLoRALinear
from tt_peft.modules import check_plain_weight, is_linear, output_projection_names, own_modules, router_names, select
from tt_peft.names import named
from tt_peft.nf4 import check_size, dequantize, is_nf4
from tt_peft.nf4_linear import NF4Linear

_QUANTIZED: dict[type[nn.Module], type[nn.Linear]] = {
    nn.Linear: NF4Linear, LoRALinear: QLoRALinear, DoRALinear: QDoRALinear,
}  # fmt: skip
_DENSE: dict[type[nn.Module], type[nn.Module]] = {quantized: plain for plain, quantized in _QUANTIZED.items()}


def quantize_nf4_(model: nn.Module, *, skip: Sequence[str] = ("lm_head",)) -> list[str]:
    """Turn the weight of every linear layer into NF4, in place, one at a time. Returns their names.

    ``skip``: names or expressions; ``"lm_head"`` means the output projection, whatever its name. Routers of
    experts are not quantized. On a model on the meta device the layers quantize when they are loaded (``load_base_`` or
    ``load_state_dict``).
    """
    names, modules = quantizable_names(model, skip=skip), own_modules(model)
    for name in names:
        quantize_linear_(modules[name], name=f"{name}.weight")
    return names


def quantizable_names(model: nn.Module, *, skip: Sequence[str] = ("lm_head",), saved: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers to quantize: none of ``skip`` or inside of modules trained in full."""
    modules = own_modules(model)
    skipped = {*router_names(model), *(output_projection_names(model) if "lm_head" in skip else ())}
    skipped |= set(named(skip, modules))
    skipped |= set(select([s for s in skip if s != "lm_head"], list(modules), what="quantize_skip"))
    trained = (*saved, *(name for name, m in modules.items() if isinstance(m, SavedModule)))
    used = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))
    names = []
    for name, module in modules.items():
        if name in skipped or type(module) not in _QUANTIZED or not is_linear(module):
            continue
        if any(name == t or name.startswith(f"{t}.") for t in trained):
            continue
        check_plain_weight(name, module)
        weight = module.get_parameter("weight")
        if used[id(weight)] > 1:
            raise ValueError(f"{name}.weight is shared with another module: put {name} in quantize_skip")
        check_size(weight, f"{name}.weight")
        names.append(name)
    return names


def quantize_linear_(module: nn.Module, *, name: str = "weight") -> None:
    """One linear layer, plain or adapted, to NF4; on the meta device, as soon as it is loaded."""
    weight = module.get_parameter("weight")
    module.__class__ = _QUANTIZED[type(module)]
    module.weight_name = name  # type: ignore[assignment]
    if not weight.is_meta:
        module.load_base_("weight", weight.detach())  # type: ignore[operator]


@torch.no_grad()
def dequantize_(model: nn.Module) -> list[str]:
    """The inverse: every NF4 weight becomes the dense matrix that it represents. Returns the names of the layers."""
    done = []
    for name, module in own_modules(model).items():
        if type(module) in _DENSE:
            weight = module.get_parameter("weight")
            module.__class__ = _DENSE[type(module)]
            if is_nf4(weight):
                module.register_parameter("weight", nn.Parameter(dequantize(weight), requires_grad=False))
            done.append(name)
    return done
