"""A run's adapter merged into its base, as a Hugging Face directory that transformers, vLLM and llama.cpp read."""

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_models
import tt_peft
from tt_ckpt.files import TMP_PREFIX, create
from tt_ckpt.hf.directory import check_room
from tt_ckpt.shown import plain
from tt_train.errors import ConfigError
from tt_train.models.load import add_adapter_, check_tokens, load_stopped, model_config
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.run.serving import Files, serving_files


def merge_run(
    path: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    base: Base = None,
    files: Mapping[str, str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write the merged model of a run or adapter to ``output``, which must be new or empty; returns it.

    Each weight is computed in fp32 and rounded once: to ``dtype``, else to the dtype that it has in the base's files.
    ``base``: as in ``load``. ``files``: more files to write, name to text.
    What was written is read back and compared before it stands there. ``tell`` hears what merging cost in precision.
    """
    target, origin = Path(output), find_origin(path, base)
    refuse_full(target)
    refuse_small(target, origin, dtype)
    model, tokenizer = _as_stored(origin), load_tokenizer(origin)
    if origin.adapter is not None:
        add_adapter_(model, origin)
        check_tokens(model, tokenizer, origin)
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        report = tt_peft.merge_lora_(model, dtype=dtype)
        rounded = any(layer.lost > 0 for layer in report.layers)
        if tell is not None:
            tell(f"{report}{'; --dtype fp32 keeps all of it' if rounded else ''}")
            if origin.base_words is not None:
                tell(origin.base_words)
    stored = _stored_dtypes(origin)
    tt_ckpt.save_hf(
        model,
        target,
        config=merged_config(origin, model, tokenizer),
        source=origin.model,
        dtype=dtype or stored,
        files={**merged_files(origin, tokenizer), **(files or {})},
    )
    return target


def _as_stored(origin: Origin) -> tt_models.Decoder:
    """The weights without an adapter, each tensor in the dtype that its file has."""
    model = None
    if origin.model is not None:
        model = tt_models.build(model_config(origin.model), device="meta")
        tt_ckpt.load_weights(model, origin.model, device="cpu")
    if origin.stopped is not None:
        model = load_stopped(origin, torch.device("cpu"), model=model)
    assert model is not None
    return model.eval()


def merged_files(origin: Origin, tokenizer: Any) -> Files:
    """The files beside the merged weights; those of a plain model are its own."""
    if origin.places == (origin.model,):
        return {}
    template = None if origin.run is None else origin.run.template
    return serving_files(origin.places, tokenizer, template, origin.model)


def merged_config(origin: Origin, model: tt_models.Decoder, tokenizer: Any) -> dict[str, Any]:
    """config.json of the merged model: its vocabulary as large as the weights, its tokens those of the tokenizer."""
    if origin.model is None:
        return tt_models.config_to_hf(model.config)
    config = dict(tt_ckpt.read_config(origin.model))
    if model.config.vocab_size != config.get("vocab_size", model.config.vocab_size):
        config["vocab_size"] = model.config.vocab_size
    stated = config.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    if origin.places != (origin.model,) and tokenizer.eos_id is not None and tokenizer.eos_id not in ends:
        config |= {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    return config


def _stored_dtypes(origin: Origin) -> dict[str, torch.dtype]:
    return {} if origin.model is None else tt_ckpt.tensor_dtypes(origin.model)


def refuse_small(target: Path, origin: Origin, dtype: torch.dtype | None) -> None:
    """ConfigError, before any weight is read, if the disk of ``target`` has no room for the merged weights."""
    if origin.model is None:
        return  # random weights by a name: save_hf finds out
    model = tt_models.build(model_config(origin.model), device="meta")
    stored = _stored_dtypes(origin)
    sizes = {name: (dtype or stored.get(name, torch.bfloat16)).itemsize for name, _ in model.named_parameters()}
    try:
        check_room(target, sum(sizes[name] * one.numel() for name, one in model.named_parameters()))
    except OSError as error:
        raise ConfigError([f"{plain(target)}: {error.strerror}"]) from error


def refuse_full(target: Path) -> None:
    """ConfigError if ``target`` holds something, or cannot be written; nothing is left there."""
    try:
        with suppress(FileNotFoundError):
            target.lstat()  # too long a name, a file on the way
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ConfigError([f"{plain(target)}: exists and is not empty; choose another -o"])
        place = next(place for place in (target, *target.absolute().parents) if place.is_dir())
        probe = place / f"{TMP_PREFIX}{secrets.token_hex(8)}"
        create(probe).close()
        probe.unlink()
    except OSError as error:
        raise ConfigError([f"{plain(target)}: cannot be written ({error.strerror}); choose another -o"]) from error
