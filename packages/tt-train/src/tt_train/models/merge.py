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
from tt_train.models.load import add_adapter_, load_stopped, model_config
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.run.serving import Files, serving_files


def merge_run(
    path: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    base: Base = None,
    files: Mapping[str, str] | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write the merged model of a run or adapter to ``output``, which must be new or empty; returns it.

    Each weight is computed in fp32 and rounded once: to ``dtype``, else to the dtype that it has in the base's files.
    ``base``: as in ``load``. ``files``: more files to write, name to text. ``dry_run``: check what can be checked
    before weights are read, and write nothing. ``tell`` receives a sentence on what merging cost in precision.
    What was written is read back and compared before it appears at ``output``.

    Raises:
        ConfigError: ``output`` holds files or cannot be written, there is no room for the weights, or a part of the
            run, its adapter or its base is missing.
    """
    target, origin = Path(output), find_origin(path, base)
    refuse_full(target)
    stored = {} if origin.model is None else tt_ckpt.tensor_dtypes(origin.model)
    model = None
    if origin.model is not None:
        model = tt_models.build(model_config(origin.model), device="meta")
        _refuse_small(target, {name: dtype or stored.get(name, torch.bfloat16) for name in model.state_dict()}, model)
    if dry_run:
        return target
    if model is not None and origin.model is not None:
        tt_ckpt.load_weights(model, origin.model, device="cpu")  # each tensor in the dtype that its file has
    if origin.stopped is not None:
        model = load_stopped(origin, torch.device("cpu"), model=model)
    assert model is not None  # only a stopped run may have no weights
    model, tokenizer = model.eval(), load_tokenizer(origin)
    if origin.adapter is not None:
        add_adapter_(model, tokenizer, origin)
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        report = tt_peft.merge_lora_(model, dtype=dtype)
        rounded = any(layer.lost > 0 for layer in report.layers)
        if tell is not None:
            tell(f"{report}{'; --dtype fp32 keeps all of it' if rounded else ''}")
            if origin.base_words is not None:
                tell(origin.base_words)
    beside: Files = {}
    if origin.places != (origin.model,):  # the files of a plain model are its own
        template = None if origin.run is None else origin.run.template
        beside = serving_files(origin.places, tokenizer, template, origin.model)
    config = merged_config(origin, model, tokenizer)
    dtypes = dtype or stored
    tt_ckpt.save_hf(model, target, config=config, source=origin.model, dtype=dtypes, files={**beside, **(files or {})})
    return target


def merged_config(origin: Origin, model: tt_models.Decoder, tokenizer: Any) -> dict[str, Any]:
    """config.json of the merged model: the vocabulary size of the weights, the special tokens of the tokenizer."""
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


def _refuse_small(target: Path, dtypes: Mapping[str, torch.dtype], model: tt_models.Decoder) -> None:
    """ConfigError if the disk of ``target`` has no room for the merged weights."""
    try:
        check_room(target, sum(dtypes[name].itemsize * one.numel() for name, one in model.named_parameters()))
    except OSError as error:
        raise ConfigError([f"{plain(target)}: {error.strerror}"]) from error


def refuse_full(target: Path) -> None:
    """ConfigError if ``target`` is not empty or cannot be written. Nothing is left there."""
    try:
        with suppress(FileNotFoundError):
            target.lstat()  # raises if a name is too long or a parent is a file
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ConfigError([f"{plain(target)}: exists and is not empty; choose another -o"])
        place = next(place for place in (target, *target.absolute().parents) if place.is_dir())
        probe = place / f"{TMP_PREFIX}{secrets.token_hex(8)}"
        create(probe).close()
        probe.unlink()
    except OSError as error:
        raise ConfigError([f"{plain(target)}: cannot be written ({error.strerror}); choose another -o"]) from error
