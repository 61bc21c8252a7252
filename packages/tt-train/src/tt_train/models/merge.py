"""A run's adapter merged into its base, as a Hugging Face directory that transformers, vLLM and llama.cpp read."""

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_ckpt.files import TMP_PREFIX, create
from tt_ckpt.hf.directory import check_room
from tt_ckpt.hf.save import Layout, choose_layout, save_weights
from tt_ckpt.hf.stored_tensors import open_tensors
from tt_ckpt.hf.weights import EMBEDDING, Weights, cast_tensor, in_pieces, is_finite
from tt_ckpt.shown import plain
from tt_peft.adapter_files.low_rank import read_low_rank
from tt_peft.merge import merged_weight
from tt_train.errors import ConfigError
from tt_train.models.load import add_adapter_, load_stopped, model_config
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.run.serving import Files, Serving, from_record, serving_of


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
        ConfigError: ``output`` is not empty or cannot be written, there is no room for the weights, or a part of the
            run, its adapter or its base is missing.
    """
    origin, target = find_origin(path, base), refuse_full(output)
    if tell is not None and origin.adapter is None and origin.stopped is None:
        tell(f"{plain(origin.path)} has no adapter to merge; its weights are written as they are")
    merged = merged_tensors(origin, dtype)
    if merged is None or not _merge_tensors(merged, origin, target, files or {}, dry_run=dry_run, tell=tell):
        _merge_model(origin, target, dtype, files or {}, dry_run=dry_run, tell=tell)
    return target


# ---- tensor by tensor --------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """A value of a tensor is not finite, or overflows; the cause says which."""


@dataclass(frozen=True, kw_only=True)
class MergedTensors:
    """The tensors of the base with the adapter's changes, each computed when it is asked for; ``losses`` as they come.

    ``rows``: how many tokens have an embedding. ``serving``: from the record of the run, if it still applies.
    """

    weights: Weights
    layout: Layout
    rows: int
    serving: Serving | None
    losses: dict[str, tt_peft.LayerLoss]


def merged_tensors(origin: Origin, dtype: torch.dtype | None) -> MergedTensors | None:
    """A merge in the memory of a few tensors. None if it needs a model.

    It needs none if the adapter is of linear layers only and was trained on the tensors of the base's files, one by one
    (``read_low_rank``), if the base computes in the dtypes of its files, and if the result keeps the base's shards.
    config.json must be unchanged since the run (its record says so), or describe the tensors.
    """
    if origin.adapter is None or origin.model is None or origin.nf4:
        return None
    tensors = open_tensors(origin.model)
    changes = read_low_rank(
        origin.adapter,
        {name: spec.shape for name, spec in tensors.specs.items()},
        lambda name: tensors.borrow(name) if name in tensors.specs else None,
    )
    embedding, dtypes = tensors.specs.get(EMBEDDING), {spec.dtype for spec in tensors.specs.values()}
    if changes is None or embedding is None or len(embedding.shape) != 2:
        return None
    if not all(kind.is_floating_point and kind.itemsize > 1 for kind in dtypes):
        return None
    serving = None if origin.run is None else from_record(origin.run.manifest.get("serving") or {}, origin.places)
    if serving is None:
        model = tt_models.build(model_config(origin.model), device="meta")
        if {name: one.shape for name, one in model.named_parameters()} != {
            n: s.shape for n, s in tensors.specs.items()
        }:
            return None  # load_weights says what differs
    specs = {name: replace(spec, dtype=dtype or spec.dtype) for name, spec in tensors.specs.items()}
    layout = choose_layout([origin.model], specs, "5GB")
    if layout.files != {name: list(header.tensors) for name, header in tensors.headers.items()}:
        return None  # the order of a model's tensors decides which file gets which
    losses: dict[str, tt_peft.LayerLoss] = {}

    @torch.no_grad()
    def get(name: str) -> Tensor:
        tensor, change = tensors.borrow(name), changes.get(name)
        try:
            if not is_finite(tensor):
                raise ValueError(f"{name} is not finite")
            if change is None:
                return cast_tensor(name, tensor, specs[name].dtype)
            merged, losses[name] = merged_weight(name, tensor, [(change, change.delta())], dtype=specs[name].dtype)
        except ValueError as error:
            raise RefusedError from error
        return merged

    config = tt_ckpt.read_config(origin.model)
    weights = Weights(
        specs=specs, get=get, pieces=lambda name: in_pieces(get(name)), config=config, format="hf", files=()
    )
    return MergedTensors(weights=weights, layout=layout, rows=embedding.shape[0], serving=serving, losses=losses)


def _merge_tensors(
    merged: MergedTensors,
    origin: Origin,
    target: Path,
    files: Mapping[str, str],
    *,
    dry_run: bool,
    tell: Callable[[str], None] | None,
) -> bool:
    """Write them. False if something is wrong with them: nothing is written, and the merge by a model says what."""
    refuse_small(target, merged.weights.nbytes)
    if dry_run:
        return True
    serving = merged.serving or _serving(origin, load_tokenizer(origin))
    if serving.vocab_size > merged.rows:
        return False
    weights = replace(merged.weights, config=merged_config(origin, serving))
    beside = {**serving.files, **files}
    try:
        save_weights(weights, target, merged.layout, source=origin.model, files=beside)
    except RefusedError:
        return False
    _say(tt_peft.MergeReport(tuple(merged.losses.values())), origin, tell)
    return True


# ---- by a model --------------------------------------------------------------------------------------------------


def _merge_model(
    origin: Origin,
    target: Path,
    dtype: torch.dtype | None,
    files: Mapping[str, str],
    *,
    dry_run: bool,
    tell: Callable[[str], None] | None,
) -> None:
    """Load the model whole, merge its adapter in place, and write it."""
    stored = {} if origin.model is None else tt_ckpt.tensor_dtypes(origin.model)
    model = None
    if origin.model is not None:
        model = tt_models.build(model_config(origin.model), device="meta")
        dtypes = {name: dtype or stored.get(name, torch.bfloat16) for name in model.state_dict()}
        refuse_small(target, sum(dtypes[name].itemsize * one.numel() for name, one in model.named_parameters()))
    if dry_run:
        return
    model, tokenizer = merged_model(origin, dtype, model=model, tell=tell), load_tokenizer(origin)
    config, own = beside_model(origin, tokenizer, model)
    beside = {**own, **files}
    tt_ckpt.save_hf(model, target, config=config, source=origin.model, dtype=dtype or stored, files=beside)


def merged_model(
    origin: Origin,
    dtype: torch.dtype | None,
    *,
    model: tt_models.Decoder | None = None,
    tell: Callable[[str], None] | None = None,
) -> tt_models.Decoder:
    """The whole model in memory with its adapter merged in place. ``model``: that of the base, on the meta device."""
    if origin.model is not None:
        model = model or tt_models.build(model_config(origin.model), device="meta")
        tt_ckpt.load_weights(model, origin.model, device="cpu")  # each tensor in the dtype that its file has
    if origin.stopped is not None:
        model = load_stopped(origin, torch.device("cpu"), model=model, tell=tell)
    assert model is not None  # only a stopped run may have no weights
    if origin.adapter is not None:
        add_adapter_(model.eval(), load_tokenizer(origin), origin)
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        _say(tt_peft.merge_lora_(model, dtype=dtype), origin, tell)
    return model.eval()


# ---- what both need ----------------------------------------------------------------------------------------------


def _say(report: tt_peft.MergeReport, origin: Origin, tell: Callable[[str], None] | None) -> None:
    rounded = any(layer.lost > 0 for layer in report.layers)
    if tell is not None:
        tell(f"{report}{'; --dtype fp32 keeps all of it' if rounded else ''}")
        if origin.base_words is not None:
            tell(origin.base_words)


def serving_files_of(origin: Origin, tokenizer: tt_data.Tokenizer) -> Files:
    """The files of the tokenizer, its templates and generation settings that differ from the base's."""
    return _serving(origin, tokenizer).files


def _serving(origin: Origin, tokenizer: tt_data.Tokenizer) -> Serving:
    return serving_of(origin.places, tokenizer, None if origin.run is None else origin.run.template, origin.model)


def beside_model(
    origin: Origin, tokenizer: tt_data.Tokenizer, model: tt_models.Decoder
) -> tuple[dict[str, Any], Files]:
    """config.json of the merged ``model``, and the files that differ from the base's."""
    is_plain = origin.places == (origin.model,)  # its files are its own
    serving = None if is_plain else _serving(origin, tokenizer)
    return merged_config(origin, serving, model), {} if serving is None else serving.files


def merged_config(origin: Origin, serving: Serving | None, model: tt_models.Decoder | None = None) -> dict[str, Any]:
    """config.json of the merged model: the vocabulary size of ``model``, the special tokens of its tokenizer."""
    if origin.model is None:
        assert model is not None
        return tt_models.config_to_hf(model.config)
    config = dict(tt_ckpt.read_config(origin.model))
    if model is not None and model.config.vocab_size != config.get("vocab_size", model.config.vocab_size):
        config["vocab_size"] = model.config.vocab_size
    stated = config.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    if serving is not None and serving.eos_id is not None and serving.eos_id not in ends:
        config |= {"eos_token_id": serving.eos_id, "bos_token_id": serving.bos_id}
    return config


def refuse_small(target: Path, nbytes: int) -> None:
    """ConfigError if the disk of ``target`` has no room for ``nbytes``."""
    try:
        check_room(target, nbytes)
    except OSError as error:
        raise ConfigError([f"{plain(target)}: {error.strerror}"]) from error


def refuse_full(output: str | Path) -> Path:
    """``output`` with ``~`` as the home folder; ConfigError if it is not empty or cannot be written, or has no home.

    Nothing is left there.
    """
    target = Path(output)
    try:
        target = target.expanduser()
        with suppress(FileNotFoundError):
            target.lstat()  # raises if a name is too long or a parent is a file
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ConfigError([f"{plain(target)}: exists and is not empty; choose another -o"])
        place = next(place for place in (target, *target.absolute().parents) if place.is_dir())
        probe = place / f"{TMP_PREFIX}{secrets.token_hex(8)}"
        create(probe).close()
        probe.unlink()
        return target
    except RuntimeError:  # of expanduser
        raise ConfigError([f"{plain(target)}: there is no such home folder; write the path without ~"]) from None
    except OSError as error:
        raise ConfigError([f"{plain(target)}: cannot be written ({error.strerror}); choose another -o"]) from error
