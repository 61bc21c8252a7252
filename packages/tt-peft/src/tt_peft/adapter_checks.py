"""Whether an adapter folder fits a model, and what its names mean there."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_peft.apply import spec_of, stacked_names, target_names
from tt_peft.config import LoRAConfig
from tt_peft.fingerprint import difference
from tt_peft.lowrank import low_ranks
from tt_peft.patterns import known, named
from tt_peft.switch import modules_of
from tt_peft.targets import full_matches, is_linear, own_modules

BASE_KEY = "tt_base"


def check_base_of(
    model: nn.Module, file: Path, settings: dict[str, Any], metadata: dict[str, str], base_model: str | None
) -> None:
    """``file`` holds the adapter's weights. Whether they were trained on a base such as this model."""
    trained_on = settings.get("base_model_name_or_path")
    here = base_model or getattr(getattr(model, "config", None), "_name_or_path", None)
    title = f"{file.parent}: this adapter was trained on {trained_on or 'another base'}"
    if BASE_KEY in metadata:
        try:
            different = difference(json.loads(metadata[BASE_KEY]), model)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file}: the metadata {BASE_KEY!r} is damaged") from None
        if different:
            raise ValueError(f"{title}, but the model here{f' ({here})' if here else ''} is another: {different}")
    elif base_model and trained_on and Path(base_model).name != Path(str(trained_on)).name:
        raise ValueError(f"{title}, but the model here is {base_model}; pass check_base=False if they are the same")


def as_here(model: nn.Module, config: LoRAConfig, folder: Path) -> LoRAConfig:
    """The config without what means nothing in this model, and ``modules_to_save`` in full names.

    PEFT passes over names that match nothing (its classifiers always have "classifier" and "score" to save), so a
    file may hold some; ``check_targets`` compares what is left with the weights. PEFT reads ``modules_to_save`` as
    endings, not as whole parts: "norm" means "input_layernorm" too; targets in a saved module get no adapter. The
    weight of a linear layer among ``target_parameters`` (transformers 5 has routers as plain parameters) is that layer.
    """
    names = list(own_modules(model))
    saved = tuple(name for name in names if name.endswith(config.modules_to_save))
    targets, excluded = config.target_modules, config.exclude_modules
    try:
        ranks, alphas = config.ranks, config.alphas
        if not isinstance(targets, str):
            targets = tuple(known(targets, names)) or targets  # of none that is known, the error names the nearest
        unknown = not full_matches(excluded, names) if isinstance(excluded, str) else None
        excluded = () if unknown else excluded if isinstance(excluded, str) else tuple(known(excluded, names))
        config = config.with_(target_modules=targets, exclude_modules=excluded)
        config = config.with_(modules_to_save=saved, rank_pattern={}, alpha_pattern={})
        layers, parameters = _split_parameters(model, config.target_parameters)
        config = config.with_(target_parameters=parameters)
        chosen = list(dict.fromkeys([*target_names(model, config), *layers]))
        outside = tuple(n for n in chosen if not any(n == s or n.startswith(f"{s}.") for s in saved))
        if layers or len(outside) < len(chosen):
            config = config.with_(
                target_modules=outside, exclude_modules=(), layers_to_transform=None, layers_pattern=()
            )
        adapted = [*outside, *stacked_names(model, config)]
        own_ranks = {re.escape(name): ranks.get(f"{name}.weight", config.rank) for name in layers}
        own_alphas = {re.escape(name): alphas.get(f"{name}.weight", config.alpha) for name in layers}
        return config.with_(
            rank_pattern=own_ranks | ranks.meaning(adapted), alpha_pattern=own_alphas | alphas.meaning(adapted)
        )
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None


def _split_parameters(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The linear layers whose weights are among ``target_parameters``, and the rest of these."""
    weights = [f"{name}.weight" for name, module in own_modules(model).items() if is_linear(module)]
    of_layers = known(targets, weights)
    layers = [name.removesuffix(".weight") for name in named(of_layers, weights)]
    return layers, tuple(target for target in targets if target not in of_layers)


def precise(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor]) -> LoRAConfig:
    """The config with a dtype that holds all that the file holds, where the base's own is narrower."""
    names, modules = {*target_names(model, config), *config.modules_to_save}, own_modules(model)
    owners = names | {name.rpartition(".")[0] for name in stacked_names(model, config)}
    own = {p.dtype for name in owners if name in modules for p in modules[name].parameters()}
    widest = functools.reduce(torch.promote_types, [*(tensor.dtype for tensor in state.values()), *own])
    return config if own == {widest} else config.with_(dtype=widest)


def check_finite(state: dict[str, Tensor], file: Path) -> None:
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {key} is {tensor.dtype}, expected floating point numbers")
        if tensor.numel() == 0:
            raise ValueError(
                f"{file}: {key} is empty: the shards of DeepSpeed ZeRO-3 or FSDP were not gathered when it was saved; "
                "save the adapter again from the gathered model"
            )
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{file}: {key} has NaN or infinite values: its training went wrong")


def check_targets(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor], folder: Path) -> None:
    """An adapter file for more or fewer layers than the model has is of another base."""
    stacked = {name.rpartition(".")[0] for name in stacked_names(model, config)}
    wanted, saved = {*target_names(model, config), *stacked}, config.modules_to_save
    found = {key.split(".lora_", 1)[0].replace(".base_layer", "") for key in state if ".lora_" in key}
    strangers = {key for key in state if ".lora_" not in key and not any(key.startswith(f"{name}.") for name in saved)}
    for title, names in (
        ("has no weights for", wanted - found),
        ("has weights for unknown", found - wanted | strangers),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(sorted(names)[:3])
            raise ValueError(f"{folder}: the adapter is of another base or kind: it {title} {listed}{more}")


def check_same(model: nn.Module, config: LoRAConfig, adapter: str, folder: Path) -> None:
    """The model's adapter must compute with the numbers that the file's was trained with."""
    for name, module in modules_of(model, adapter).items():
        for local, low_rank in low_ranks(module, adapter).items():
            own, given = low_rank.spec, spec_of(f"{name}.{local}" if local else name, config)
            for what, here, there in (
                ("rank", own.rank, given.rank),
                ("scaling", own.scaling, given.scaling),
                ("use_dora", own.config.use_dora, given.config.use_dora),
            ):
                if here != there:
                    raise ValueError(f"{folder}: {what} is {there} for {name}, but the model's {adapter!r} has {here}")
