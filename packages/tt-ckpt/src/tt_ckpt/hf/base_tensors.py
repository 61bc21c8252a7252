"""The base tensors of a module, as in its checkpoint: each once, with every name and place that it has.

Adapter parameters (of modules with ``adapter_params``) are left out: they have files of their own. A model may say how
its parameters differ from those in the files by ``hf_sources``, ``join_from_hf`` and ``split_for_hf``.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tt_ckpt.safetensors_file import TensorSpec

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(kw_only=True)
class BaseTensor:
    """One parameter or persistent buffer. A tied one has several names and places."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, tensor: Tensor) -> None:
        """Make ``tensor`` the value in every place."""
        old = self.tensor
        if isinstance(old, nn.Parameter):
            if old.device == tensor.device and old.device.type != "meta":
                old.data = tensor  # the same object stays: an optimizer may refer to it
                return
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
            tensor.__dict__.update(old.__dict__)
        for module, local in self.places:
            setattr(module, local, tensor)
        self.tensor = tensor


def base_tensors(model: nn.Module) -> list[BaseTensor]:
    """All base tensors of ``model``, in the order of its modules."""
    found: dict[int, BaseTensor] = {}
    adapters: set[str] = set()  # a module comes before the modules inside it, which may be its adapter
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if callable(adapter_params := getattr(module, "adapter_params", None)):
            adapters.update(dot + local for local in adapter_params())
        ask = getattr(module, "file_parameters", None)  # of a module that keeps them in another form
        tensors = ask() if callable(ask) else dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        tensors |= {local: buffer for local, buffer in buffers if local not in module._non_persistent_buffers_set}
        for local, tensor in tensors.items():
            name = dot + local
            if name in adapters:
                continue
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            base = found.setdefault(id(tensor), BaseTensor(tensor=tensor))
            if name not in base.names:
                base.names.append(name)
            base.places.append((module, local))
    return list(found.values())


def sources_of(model: nn.Module, name: str) -> list[str]:
    """The names of the tensors in the files that make up a parameter."""
    ask = getattr(model, "hf_sources", None)
    return list(ask(name)) if callable(ask) else [name]


def join_sources(model: nn.Module, name: str, keys: list[str], parts: list[Tensor]) -> Tensor:
    """The parameter made of ``parts``, the tensors at ``keys``: its sources, or its own name if a file has it whole."""
    join = getattr(model, "join_from_hf", None)
    if not callable(join) or keys != sources_of(model, name):
        return parts[0]
    joined: Tensor = join(name, parts)
    return joined


def split_sources(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors in the files for a parameter, by name."""
    split = getattr(model, "split_for_hf", None)
    return split(name, tensor) if callable(split) else {name: tensor}


def meta(spec: TensorSpec) -> Tensor:
    """A tensor without data, to find out which shape an operation gives."""
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
