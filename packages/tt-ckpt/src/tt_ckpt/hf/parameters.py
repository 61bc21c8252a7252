"""The tensors of a module that a checkpoint holds, each once, with every name and place it has.

Adapter parameters (of modules with ``adapter_params``) are left out: they have files of their own. A model may say how
its parameters differ from the files by ``hf_sources``, ``join_from_hf`` and ``split_for_hf``.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tt_ckpt.safetensors_file import TensorSpec

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(kw_only=True)
class Slot:
    """One parameter or persistent buffer. A tied one has several names and places."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)

    def put(self, tensor: Tensor) -> None:
        """Make ``tensor`` the value in every place."""
        old = self.tensor
        if self.is_parameter:
            if old.device == tensor.device and old.device.type != "meta":
                old.data = tensor  # the same object stays: an optimizer may hold it
                return
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
            tensor.__dict__.update(old.__dict__)
        for module, local in self.places:
            setattr(module, local, tensor)
        self.tensor = tensor


def find_slots(model: nn.Module) -> list[Slot]:
    """All base tensors of ``model`` in module order."""
    found: dict[int, Slot] = {}
    adapters = adapter_tensor_names(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        transient = module._non_persistent_buffers_set
        tensors = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        tensors |= {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
            if name not in transient
        }
        for local, tensor in tensors.items():
            name = f"{prefix}.{local}" if prefix else local
            if name in adapters:
                continue
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            slot = found.setdefault(id(tensor), Slot(tensor=tensor))
            if name not in slot.names:
                slot.names.append(name)
            slot.places.append((module, local))
    return list(found.values())


def adapter_tensor_names(model: nn.Module) -> set[str]:
    """Full names of what modules with ``adapter_params`` call their adapters' own; a local name may be dotted."""
    return {
        f"{prefix}.{local}" if prefix else local
        for prefix, module in model.named_modules(remove_duplicate=False)
        if callable(ask := getattr(module, "adapter_params", None))
        for local in ask()
    }


def sources_of(model: nn.Module, name: str) -> list[str]:
    ask = getattr(model, "hf_sources", None)
    return list(ask(name)) if callable(ask) else [name]


def join(model: nn.Module, name: str, keys: list[str], parts: list[Tensor]) -> Tensor:
    """The parameter from the tensors at ``keys``, which are its sources, or the parameter as it is in the model."""
    if not callable(getattr(model, "join_from_hf", None)) or keys != sources_of(model, name):
        return parts[0]
    joined: Tensor = model.join_from_hf(name, parts)  # type: ignore[operator]
    return joined


def split(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not callable(getattr(model, "split_for_hf", None)):
        return {name: tensor}
    pieces: dict[str, Tensor] = model.split_for_hf(name, tensor)  # type: ignore[operator]
    return pieces


def meta(spec: TensorSpec) -> Tensor:
    """A tensor without data, to ask what shape an operation would give."""
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
