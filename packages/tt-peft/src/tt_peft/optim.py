"""LoRA+: a higher learning rate for B than for A: https://arxiv.org/abs/2402.12354."""

from typing import Any

from torch import nn

from tt_peft.switch import adapter_parameters


def lora_plus_groups(
    model: nn.Module, *, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, embedding_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: B learns at ``ratio * lr``, everything else at ``lr``.

    ``embedding_lr`` (default: ``lr``) is for both factors of embeddings. DoRA's magnitudes and other vectors get no
    weight decay. Empty groups are left out.
    """
    if not lr > 0 or not ratio > 0 or (embedding_lr is not None and not embedding_lr > 0):
        raise ValueError(f"lr, ratio and embedding_lr must be positive, got {lr}, {ratio} and {embedding_lr}")
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "B": {"lr": lr * ratio, "weight_decay": weight_decay},
        "embedding": {"lr": lr if embedding_lr is None else embedding_lr, "weight_decay": weight_decay},
        "other": {"lr": lr, "weight_decay": weight_decay},
        "vector": {"lr": lr, "weight_decay": 0.0},
    }
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in adapter_parameters(model).items():
        parameters[_group(model, name, parameter)].append(parameter)
    if not any(parameters.values()):
        raise ValueError("the model has no adapter to train: call apply_lora_ first")
    return [{"name": name, "params": parameters[name], **groups[name]} for name in groups if parameters[name]]


def _group(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    owner = model.get_submodule(name.split(".adapters.")[0]) if ".adapters." in name else model
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("lora_A", "lora_B"):
        return "embedding" if isinstance(owner, nn.Embedding) else leaf.removeprefix("lora_")
    return "vector" if parameter.dim() == 1 else "other"
