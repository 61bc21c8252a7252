"""The low-rank changes in an adapter folder, for a merge that reads the base tensor by tensor and builds no model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tt_peft.adapter_files.checks import BASE_KEY, check_finite, difference
from tt_peft.adapter_files.folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_adapter_weights
from tt_peft.adapter_files.peft_config import config_from_peft
from tt_peft.lowrank import LowRank, spec_of
from tt_peft.names import known, named

_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
_EMBEDDING = "embed_tokens"


def read_low_rank(
    path: str | Path, shapes: Mapping[str, Sequence[int]], get: Callable[[str], Tensor | None]
) -> dict[str, LowRank] | None:
    """What an adapter folder changes, by the name of the base weight; None if only a model shows what it means.

    ``shapes`` and ``get``: all tensors in the files of the base. The fingerprint in the adapter file must be that of
    these tensors: then they are the parameters that it was trained on, one by one. The adapter must be of linear layers
    only, and its config must name exactly the layers in its file. ``load_adapter`` is needed for files of PEFT,
    embeddings, stacked experts, modules trained in full, expressions, and every error.
    """
    folder = Path(path)
    try:
        settings = read_adapter_config(folder)
        state, metadata = read_adapter_weights(folder)
        if BASE_KEY not in metadata or difference(json.loads(metadata[BASE_KEY]), shapes, get):
            return None
        check_finite(state, folder / WEIGHTS_FILE)
        config = config_from_peft(settings, folder / CONFIG_FILE)
    except (ValueError, OSError, TypeError, AttributeError, RecursionError, OverflowError):
        return None  # load_adapter says what is wrong
    more = [config.exclude_modules, config.layers_to_transform, config.modules_to_save, config.target_parameters]
    more.append(settings.get("trainable_token_indices"))
    if config.init != "kaiming" or isinstance(config.target_modules, str) or any(more):
        return None
    owners = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    names = named(config.target_modules, owners)
    kinds = _FACTORS if config.use_dora else _FACTORS[:2]
    is_whole = state.keys() == {name + kind for name in names for kind in kinds}
    if not is_whole or len(known(config.target_modules, owners)) < len(config.target_modules):
        return None
    changes: dict[str, LowRank] = {}
    for name in names:
        shape = tuple(shapes[f"{name}.weight"])
        if len(shape) != 2 or name.rpartition(".")[2] == _EMBEDDING:
            return None
        spec = spec_of(name, config)
        sizes = [(spec.rank, shape[-1]), (shape[0], spec.rank), shape[:1]]
        found = [state[name + kind] for kind in kinds]
        fits = all(tuple(tensor.shape) == size for tensor, size in zip(found, sizes, strict=False))
        if not fits or spec.rank > min(shape):
            return None
        low_rank = LowRank(spec, sizes[0], sizes[1], like=torch.empty(0, device="meta"))
        for (local, _), tensor in zip(list(low_rank.named_parameters()), found, strict=True):
            setattr(low_rank, local, nn.Parameter(tensor.clone(), requires_grad=False))
        changes[f"{name}.weight"] = low_rank
    return changes
