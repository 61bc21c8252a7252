"""Weights of embeddings and output projections in adapter files of PEFT, other than low-rank factors.

Copies of the base (of layers with an adapter, of a resized vocabulary), whole layers to use in its place, and single
rows (``trainable_token_indices``). Weights equal to the base's are ignored; the rest becomes ``modules_to_save``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_peft.modules import output_projection_names, own_modules, tied_embedding, untie
from tt_peft.shown import plain, shown

_PART = 4096  # rows compared at a time, in fp32
_COPY = ".base_layer"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_LOAD_OVER = "a different base, or a changed one; load the adapter over the base that it was trained on"


def take_embeddings(
    model: nn.Module, state: dict[str, Tensor], settings: dict[str, Any], file: Path, *, check_base: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that the base does not have, and the names of the layers whose whole weight the adapter contains."""
    _check_vocabulary(model, state, file)
    state, tied = _without_base_copies(model, state, file), tied_embedding(model)
    if tied is not None:
        state = _without_tied_head(model, state, settings, file, tied)
    state, rows = _rows_as_layers(model, state, settings, file)
    state, layers = _whole_layers(model, state, settings, file, tied=tied, check_base=check_base)
    return state, rows + layers


def _check_vocabulary(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """An adapter that was trained after the vocabulary was resized needs a base with as many rows."""
    modules, heads = own_modules(model), output_projection_names(model)
    for key, tensor in state.items():
        owner = _owner(key)
        if not isinstance(modules.get(owner), nn.Embedding) and owner not in heads:
            continue
        whole_weight = ".lora_" not in key and key.endswith(".weight")
        head = whole_weight or (owner in heads and key.endswith(".lora_B.weight"))
        rows = tensor.shape[-1] if key.endswith(".lora_embedding_A") else len(tensor) if head and tensor.dim() else None
        own = len(modules[owner].get_parameter("weight"))
        if rows is not None and rows != own:
            raise ValueError(
                f"{file.parent}: {key} has shape {list(tensor.shape)} for {rows:,} tokens, the base has {own:,}: the "
                "vocabulary was resized before training; load the adapter over that base (in transformers: "
                f"resize_token_embeddings({rows}), then save_pretrained)"
            )


def _without_base_copies(model: nn.Module, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """PEFT also saves the base of adapted embeddings; it must equal that of the model."""
    kept, parameters = {}, dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in state.items():
        owner, found, local = key.rpartition(".base_layer.")
        if not found or ".lora_" in key:
            kept[key] = tensor
        elif (own := parameters.get(f"{owner}.{local}")) is not None and _changed(own, tensor, key, file)[0]:
            raise ValueError(f"{file.parent}: {key} contains base weights that differ from the model's: {_LOAD_OVER}")
    return kept


def _without_tied_head(
    model: nn.Module, state: dict[str, Tensor], settings: dict[str, Any], file: Path, tied: str
) -> dict[str, Tensor]:
    """Refuse an adapter of an output projection that the model ties to its embedding."""
    kept, modules, heads = {}, own_modules(model), output_projection_names(model)
    for key, tensor in state.items():
        owner = _owner(key)
        if owner != tied and owner not in heads and owner.rpartition(".")[2] != "lm_head":
            kept[key] = tensor
            continue
        what = "ensure_weight_tying=True" if settings.get("ensure_weight_tying") is True else ""
        what = "trainable_token_indices" if key.endswith(_TOKENS) else what
        if what:
            raise ValueError(
                f"{file.parent}: {what} is not supported for {owner}: the model ties its output projection to {tied}; "
                "merge the adapter in PEFT (merge_and_unload) and use the result"
            )
        if owner in modules:
            kept[key] = tensor
        elif key != f"{owner}.weight" or _changed(modules[tied].get_parameter("weight"), tensor, key, file)[0]:
            raise ValueError(f"{file.parent}: {key} belongs to a separate output projection, but {untie(tied)}")
    return kept


def _rows_as_layers(
    model: nn.Module, state: dict[str, Tensor], settings: dict[str, Any], file: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Single trained rows become a whole layer: the base's, with these rows replaced."""
    kept, names, modules = {}, [], own_modules(model)
    for key, tensor in state.items():
        owner = key.removesuffix(_TOKENS)
        if owner == key or owner not in modules:
            kept[key] = tensor
            continue
        own, rows = modules[owner].get_parameter("weight"), _indices(settings, owner, file)
        if own.is_meta:
            raise ValueError(f"{owner} is on the meta device: load the base weights before trainable_token_indices")
        fits = tensor.dim() and len(rows) == len(tensor) and tensor.shape[1:] == own.shape[1:]
        if not fits or not all(0 <= row < len(own) for row in rows):
            raise ValueError(
                f"{file.parent}: {key} has shape {list(tensor.shape)} for trainable_token_indices={shown(rows)}, which "
                f"does not fit {owner}.weight {list(own.shape)}: {_LOAD_OVER}"
            )
        weight = own.detach().to("cpu", torch.promote_types(own.dtype, tensor.dtype), copy=True)
        weight[torch.tensor(rows, dtype=torch.long)] = tensor.to(weight.dtype)
        kept[f"{owner}.weight"] = weight
        names.append(owner)
    if settings.get("trainable_token_indices") and not any(key.endswith(_TOKENS) for key in state):
        where = f"{file.parent}: adapter_config.json"
        raise ValueError(f"{where}: trainable_token_indices are set, but {file.name} has none")
    return kept, names


def _indices(settings: dict[str, Any], owner: str, file: Path) -> list[int]:
    """PEFT: a list is of the input embeddings, a mapping of layers by the ends of their names."""
    given = settings.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if owner.endswith(str(name))), None)
    if not isinstance(given, list) or not all(type(row) is int for row in given):
        raise ValueError(
            f"{plain(file.parent)}: adapter_config.json: trainable_token_indices has no list of tokens for {owner}, "
            f"found {shown(given)}; use both files of one adapter"
        )
    return given


def _whole_layers(
    model: nn.Module,
    state: dict[str, Tensor],
    settings: dict[str, Any],
    file: Path,
    *,
    tied: str | None,
    check_base: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """Embeddings and output projections that ``modules_to_save`` does not name: PEFT loads them over the base's."""
    modules, heads = own_modules(model), output_projection_names(model)
    endings = tuple(settings.get("modules_to_save") or ())
    bare: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        owner = key.rpartition(".")[0]
        module = modules.get(owner)
        if (isinstance(module, nn.Embedding) or owner in heads) and ".lora_" not in key and not owner.endswith(endings):
            bare.setdefault(owner, {})[key] = tensor
    brought = []
    for owner, tensors in bare.items():
        parameters = {f"{owner}.{local}": p for local, p in modules[owner].named_parameters(recurse=False)}
        own = {key: tensor for key, tensor in tensors.items() if key in parameters}
        differing = [(key, *_changed(parameters[key], tensor, key, file)) for key, tensor in own.items()]
        changed = [(key, rows, far) for key, rows, far in differing if rows]
        if not changed:
            state = {key: tensor for key, tensor in state.items() if key not in tensors}
            continue
        key, rows, far = changed[0]
        found = f"{file.parent}: {key} differs from the base's in {rows:,} of {len(tensors[key]):,} rows"
        if tied is not None:
            cure = f"{untie(tied)}; or load the adapter over the resized base that it was trained on"
            raise ValueError(f"{found}, but {cure}")
        if check_base and 2 * far > len(tensors[key]):
            raise ValueError(f"{found}, most of them completely: another base; check_base=False uses the file's")
        brought.append(owner)
    return state, brought


def _owner(key: str) -> str:
    """The module of the base that a tensor of an adapter file is for."""
    owner = key.split(".lora_")[0]
    for ending in (_TOKENS, ".weight", ".bias", _COPY):
        owner = owner.removesuffix(ending)
    return owner


@torch.no_grad()
def _changed(own: Tensor, given: Tensor, key: str, file: Path) -> tuple[int, int]:
    """How many rows differ by more than the dtypes do, and how many by half their size; a different shape is an error.

    On the meta device nothing is known: every row counts as slightly different.
    """
    if own.shape != given.shape:
        raise ValueError(
            f"{file.parent}: {key} has shape {list(given.shape)}, the base has {list(own.shape)}: {_LOAD_OVER}"
        )
    if own.is_meta:
        return len(own), 0
    differing = far = 0
    for begin in range(0, len(own), _PART):
        a, b = own[begin : begin + _PART].cpu(), given[begin : begin + _PART]
        equal = (a.to(b.dtype) == b) | (a == b.to(a.dtype))
        if {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}:  # neither has all values of the other
            equal |= torch.isclose(a.float(), b.float(), rtol=1e-2, atol=1e-6)
        unequal = ~equal.flatten(1).all(1) if equal.dim() > 1 else ~equal
        differing += int(unequal.sum())
        a, b = a.float().view(len(a), -1), b.float().view(len(b), -1)
        far += int((torch.linalg.vector_norm(a - b, dim=1) > 0.5 * torch.linalg.vector_norm(a, dim=1)).sum())
    return differing, far
