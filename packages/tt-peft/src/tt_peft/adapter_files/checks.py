"""Whether an adapter folder fits a model: the fingerprint of its base, its names, ranks and values."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_peft.apply import stacked_names, target_names
from tt_peft.config import LoRAConfig
from tt_peft.lowrank import AdapterModule, is_sharded, low_ranks, spec_of, whole
from tt_peft.modules import full_matches, is_linear, own_modules
from tt_peft.names import known, named, owner_of
from tt_peft.nf4_linear import NF4Base
from tt_peft.shown import listed, plain
from tt_peft.switch import clean_name, modules_of, unwrapped

BASE_KEY = "tt_base"  # of the metadata: the fingerprint of the base
_SAMPLES = 16  # values of one tensor
_TENSORS = 12


def check_base_of(
    model: nn.Module, file: Path, settings: dict[str, Any], metadata: dict[str, str], base_model: str | None
) -> None:
    """ValueError if the weights in ``file`` were trained on a different base than this model."""
    trained_on = settings.get("base_model_name_or_path")
    trained_on = trained_on if isinstance(trained_on, str) else None  # config_from_peft refuses anything else
    here = base_model or getattr(getattr(model, "config", None), "_name_or_path", None)
    title = f"{plain(file.parent)}: this adapter was trained on {plain(trained_on) if trained_on else 'another base'}"
    if BASE_KEY in metadata:
        try:
            base = base_parameters(model)
            different = difference(json.loads(metadata[BASE_KEY]), {n: p.shape for n, p in base.items()}, base.get)
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            raise ValueError(f"{plain(file)}: the metadata {BASE_KEY!r} is damaged; save the adapter again") from None
        if different:
            raise ValueError(
                f"{title}, but the model here{f' ({plain(here)})' if here else ''} is different: {different}; load it "
                "over the base that it was trained on"
            )
    elif base_model and trained_on and Path(base_model).name != Path(trained_on).name:
        raise ValueError(f"{title}, but the model here is {plain(base_model)}; check_base=False if they are the same")


def as_here(model: nn.Module, config: LoRAConfig, folder: Path) -> LoRAConfig:
    """The config without names that match nothing in this model, and with ``modules_to_save`` in full names.

    PEFT ignores names that match nothing (its classifiers always have "classifier" and "score" to save), so a
    file may name some; ``check_targets`` compares what is left with the weights. PEFT reads ``modules_to_save`` as
    endings, not as whole parts: "norm" means "input_layernorm" too; targets in a saved module get no adapter. The
    weight of a linear layer among ``target_parameters`` (transformers 5 has routers as plain parameters) is that layer.
    """
    names, ends = list(own_modules(model)), frozenset(config.modules_to_save)
    saved = tuple(name for name in names if any(name[start:] in ends for start in range(len(name))))
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
        owners = frozenset(saved)
        outside = tuple(name for name in chosen if owner_of(name, owners) is None)
        if layers or len(outside) < len(chosen):
            config = config.with_(
                target_modules=outside, exclude_modules=(), layers_to_transform=None, layers_pattern=()
            )
        adapted = [*outside, *stacked_names(model, config)]
        own_ranks = {re.escape(name): ranks.get(f"{name}.weight", config.rank) for name in layers}
        own_alphas = {re.escape(name): alphas.get(f"{name}.weight", config.alpha) for name in layers}
        own_ranks, own_alphas = own_ranks | ranks.meaning(adapted), own_alphas | alphas.meaning(adapted)
        return config.with_(rank_pattern=own_ranks, alpha_pattern=own_alphas)
    except ValueError as error:
        raise ValueError(f"{plain(folder)}: the adapter does not fit this model: {error}") from None


def _split_parameters(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The linear layers whose weights are among ``target_parameters``, and the rest of these."""
    weights = [f"{name}.weight" for name, module in own_modules(model).items() if is_linear(module)]
    of_layers = known(targets, weights)
    layers, kept = [name.removesuffix(".weight") for name in named(of_layers, weights)], frozenset(of_layers)
    return layers, tuple(target for target in targets if target not in kept)


def precise(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor]) -> LoRAConfig:
    """The config with a dtype for the exact values of the file, if that of the base is narrower."""
    names, modules = {*target_names(model, config), *config.modules_to_save}, own_modules(model)
    owners = names | {name.rpartition(".")[0] for name in stacked_names(model, config)}
    own = {p.dtype for name in owners if name in modules for p in modules[name].parameters()}
    widest = functools.reduce(torch.promote_types, [*(tensor.dtype for tensor in state.values()), *own])
    return config if own == {widest} else config.with_(dtype=widest)


def check_amount(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """ValueError if a file has far more values than the model: an adapter of it cannot."""
    count, base = sum(tensor.numel() for tensor in state.values()), sum(p.numel() for p in model.parameters())
    if count > 8 * base + (1 << 20):
        key = max(state, key=lambda key: state[key].numel())
        raise ValueError(
            f"{plain(file)}: {count:,} values, the model has {base:,}: not an adapter of it; the largest tensor is "
            f"{key} {list(state[key].shape)}; use the adapter of this base"
        )


def check_finite(state: dict[str, Tensor], file: Path) -> None:
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{plain(file)}: {key} is {tensor.dtype}, expected floats; save the adapter again")
        if tensor.numel() == 0:
            raise ValueError(
                f"{plain(file)}: {key} is empty: the shards of DeepSpeed ZeRO-3 or FSDP were not gathered when it was "
                "saved; save the adapter again from the gathered model"
            )
        if not (finite := torch.isfinite(tensor.float())).all():
            wrong = finite.numel() - int(finite.sum())
            raise ValueError(
                f"{plain(file)}: {key} has NaN or infinite values ({wrong:,} of {finite.numel():,}): its training went "
                "wrong; use an earlier checkpoint of it"
            )


def check_ranks(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor], folder: Path) -> None:
    """ValueError unless the ranks of the config are those of the tensors; checked before memory is reserved."""
    largest = max((max(tensor.shape, default=0) for tensor in state.values()), default=0)
    for name in target_names(model, config) + stacked_names(model, config):
        rank = spec_of(name, config).rank
        found = state.get(f"{name}.lora_A.weight", state.get(f"{name}.lora_embedding_A"))
        if rank > (largest if found is None or not found.dim() else len(found)):
            shape = f"has shape {list(found.shape)}" if found is not None else "is smaller"
            raise ValueError(
                f"{plain(folder)}: adapter_config.json gives {name} rank {rank:,} (r, rank_pattern), but its lora_A "
                f"{shape} in the weights; use both files of one adapter"
            )


def check_targets(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor], folder: Path) -> None:
    """ValueError if the file is for more or fewer layers than the model has."""
    stacked = {name.rpartition(".")[0] for name in stacked_names(model, config)}
    wanted, saved = {*target_names(model, config), *stacked}, frozenset(config.modules_to_save)
    found = {key.split(".lora_", 1)[0].replace(".base_layer", "") for key in state if ".lora_" in key}
    strangers = {key for key in state if ".lora_" not in key and owner_of(key, saved) is None}
    for title, names in (
        ("has no weights for", wanted - found),
        ("has weights for unknown", found - wanted | strangers),
    ):
        if names:
            raise ValueError(
                f"{plain(folder)}: the adapter belongs to a different base or is of a different kind: it {title} "
                f"{listed(names)}; load it over the base that it was trained on"
            )


def check_same(model: nn.Module, config: LoRAConfig, adapter: str, folder: Path) -> None:
    """ValueError unless the adapter of the model has the numbers that the one in the file was trained with."""
    for name, module in modules_of(model, adapter).items():
        for local, low_rank in low_ranks(module, adapter).items():
            own, given = low_rank.spec, spec_of(f"{name}.{local}" if local else name, config)
            for what, here, there in (
                ("rank", own.rank, given.rank),
                ("scaling", own.scaling, given.scaling),
                ("use_dora", own.config.use_dora, given.config.use_dora),
            ):
                if here != there:
                    raise ValueError(
                        f"{plain(folder)}: {what} is {there} for {name}, but the model's {adapter!r} has {here}; load "
                        "it under another adapter name"
                    )


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Shapes of the base and a few of its values: ``{"shapes", "parameters", "tensors", "values"}``.

    ``shapes`` is a digest of all names and shapes. ``values`` samples dense tensors, rounded to bfloat16, so that the
    same base is recognised in another dtype or with other layers in NF4. The meta device is not sampled. Of a sharded
    model every rank must call this.
    """
    base = base_parameters(model)
    plain_tensors = [name for name, p in sorted(base.items()) if _is_sampled(p) and p.is_floating_point()]
    sampled = plain_tensors[:: max(1, len(plain_tensors) // _TENSORS)][:_TENSORS]
    return {
        "shapes": _digest({name: p.shape for name, p in base.items()}),
        "parameters": sum(p.numel() for p in base.values()),
        "tensors": len(base),
        "values": {name: _sample(base[name]) for name in sampled},
    }


def _digest(shapes: Mapping[str, Sequence[int]]) -> str:
    listing = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def _is_sampled(tensor: Tensor) -> bool:
    """Whether it is dense, or a shard of a dense one, and on a device."""
    own = tensor.to_local() if is_sharded(tensor) else tensor
    return type(own.detach()) is Tensor and not tensor.is_meta


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that belong to the base, by clean name; tied ones once."""
    model = unwrapped(model)
    added = {
        f"{prefix}.{local}" if prefix else local
        for prefix, module in model.named_modules()
        if isinstance(module, AdapterModule)
        for local in module.adapter_params()
    }
    base: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        own = module.file_parameters() if isinstance(module, NF4Base) else dict(module.named_parameters(recurse=False))
        for local, parameter in own.items():
            if (name := f"{prefix}.{local}" if prefix else local) not in added:
                base.setdefault(id(parameter), (clean_name(name), parameter))
    return dict(base.values())


@torch.no_grad()
def _sample(tensor: Tensor) -> list[float]:
    """Evenly spaced values. Places are whole numbers, because float32 is not exact above 2**24."""
    tensor = whole(tensor)
    last, count = tensor.numel() - 1, min(_SAMPLES, tensor.numel())
    places = torch.tensor([i * last // max(1, count - 1) for i in range(count)], dtype=torch.long, device=tensor.device)
    index: list[Tensor] = []
    for size in reversed(tensor.shape):  # no flat copy of a transposed weight; torch.unravel_index imports sympy
        index, places = [places % size, *index], places // size
    chosen = tensor.detach()[tuple(index)]
    return [float(v) for v in chosen.reshape(-1).to(torch.bfloat16).tolist()]


def difference(
    saved: dict[str, Any], shapes: Mapping[str, Sequence[int]], get: Callable[[str], Tensor | None]
) -> str | None:
    """How a base differs from the one that an adapter was trained on, in words; None if it does not.

    ``shapes``: of all its tensors by name. ``get`` gives a tensor, or None if there is none of that name.
    """
    counts = [saved.get(key, 0) for key in ("parameters", "tensors")]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("counts must be whole numbers")
    if saved.get("shapes") != _digest(shapes):
        return (
            f"names or shapes differ (here: {sum(map(math.prod, shapes.values())):,} parameters in {len(shapes)} "
            f"tensors; the adapter's base: {counts[0]:,} in {counts[1]})"
        )
    outside = total = 0
    for name, values in saved.get("values", {}).items():
        tensor = get(name)
        if tensor is None or not _is_sampled(tensor):
            continue
        here = _sample(tensor)
        total += len(values)
        largest = max(map(abs, values), default=0.0)
        outside += sum(abs(a - b) > 0.01 * abs(a) + 1e-6 * largest for a, b in zip(values, here, strict=True))
    if outside > 0.05 * total:
        return f"the values of its weights differ ({outside} of {total} compared)"
    return None
