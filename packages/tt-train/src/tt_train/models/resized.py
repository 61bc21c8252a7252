"""A base whose vocabulary was resized before its adapter was trained: it is resized here as it was there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tt_peft.adapter_files.folder import WEIGHTS_FILE, read_adapter_config, read_adapter_weights
from tt_train.errors import ConfigError

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@torch.no_grad()
def fit_vocabulary_(model: Any, adapter: Path) -> None:
    """Give ``model`` the rows that the adapter folder's whole embeddings have more than it, in place.

    The new rows come from the adapter's file; those of a tied model, all of them. Does nothing for an adapter without
    whole embeddings, or of the model's own size.
    """
    file = adapter / WEIGHTS_FILE
    if not file.is_file():
        return  # load_adapter says what there is
    state, _ = read_adapter_weights(adapter)
    whole = {name: found for name in (_EMBEDDING, _HEAD) if (found := _whole(state, name)) is not None}
    here, tied = model.config.vocab_size, model.config.tie_word_embeddings
    grown = max((len(tensor) for tensor in whole.values()), default=here)
    if grown <= here:
        return
    names = [_EMBEDDING] if tied else [_EMBEDDING, _HEAD]
    for name in names:
        if name not in whole or len(whole[name]) != grown:
            raise ConfigError(
                [
                    f"{file}: its vocabulary was resized from {here} to {grown} rows, but it holds no {name} of that "
                    "size; give the resized base that it was trained on: --base DIR"
                ]
            )
    if tied and not torch.equal(whole[_EMBEDDING], whole.get(_HEAD, whole[_EMBEDDING])):
        saved = read_adapter_config(adapter).get("modules_to_save") or ()
        if not _EMBEDDING.endswith(tuple(saved)):
            raise ConfigError(
                [
                    f"{file}: its vocabulary was resized from {here} to {grown} rows; {_EMBEDDING} and {_HEAD} differ, "
                    "but the model ties them (tie_word_embeddings); give a base with an output projection of its own: "
                    "--base DIR"
                ]
            )
        whole[_EMBEDDING] = whole[_HEAD]  # the output projection's; what the embedding learned comes with the adapter
    for name in names:
        module = model.get_submodule(name)
        old = module.get_parameter("weight")
        new = whole[name].to(old.device, old.dtype, copy=True)
        if not tied:
            new[:here] = old  # load_adapter puts the file's in its place, in the file's precision
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", grown)
    model.config = replace(model.config, vocab_size=grown)


def _whole(state: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """A module's whole weight in an adapter file, or None: as it was trained, or under what was trained."""
    keys = (f"{name}.{part}weight" for part in ("", "modules_to_save.", "base_layer.", "token_adapter.base_layer."))
    return next((state[key] for key in keys if key in state), None)
