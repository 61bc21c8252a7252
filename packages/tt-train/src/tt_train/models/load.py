"""A model and its tokenizer from a run directory, a model directory, an adapter or a hub id."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_models
import tt_peft
from tt_ckpt.shown import plain
from tt_models.limits import refuse_too_large, weight_bytes
from tt_train.errors import ConfigError
from tt_train.job import DTYPES, lora_config, read_hf_config
from tt_train.master_weights import join
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.models.resized import fit_vocabulary_
from tt_train.recipe_file import repeating


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    adapter: bool = True,
    base: Base = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[tt_models.Decoder, Any]:
    """The model at ``path``, in evaluation mode, and its tokenizer (with the template that a run was trained with).

    Tokenizer, chat template and generation settings beside a run or adapter go before those of its base.

    Args:
        path: a run directory (its model, or its base with its adapter; a stopped run: its newest checkpoint), a
            Hugging Face model directory, a PEFT adapter directory, or a hub id.
        device: the GPU if there is one, else the CPU.
        dtype: the run's or the files' own by default; fp16 files are fp32 on a CPU.
        adapter: False gives the base model of a run or adapter.
        base: where the base is now, ``nf4`` or ``dense``, or both: see ``find_origin``.
        tell: hears which base computes, if an adapter was trained on 4 bits.

    Raises:
        ConfigError, ValueError, FileNotFoundError: with what is missing and the cure.
    """
    origin = find_origin(path, base)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or DTYPES.get(str(origin.settings.get("dtype")))
    if tell is not None and origin.base_words is not None and adapter:
        tell(origin.base_words)
    if origin.stopped is not None:
        model = load_stopped(origin, device, dtype=dtype, adapter=adapter)
    else:
        assert origin.model is not None  # of what is no stopped run there are weights
        model = load_base(origin.model, device=device, dtype=dtype)
    tokenizer = load_tokenizer(origin)
    if adapter and origin.adapter is not None:
        add_adapter_(model, origin)
    if origin.adapter is not None and adapter:
        check_tokens(model, tokenizer, origin)
    return model.eval(), tokenizer


def load_base(source: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> tt_models.Decoder:
    """A Hugging Face model directory as one of our models; ``dtype``: ``saved_dtype`` by default."""
    dtype = dtype or saved_dtype(source, device)
    model = tt_models.build(model_config(source), device="meta", dtype=dtype)
    refuse_too_large(f"{source}: the model", weight_bytes(model), device, "take a smaller model, or a larger machine")
    tt_ckpt.load_weights(model, source, dtype=dtype, device=device)
    return model.eval()


def model_config(source: Path) -> tt_models.ModelConfig:
    """The config of a Hugging Face model directory, read strictly; ValueError names the file."""
    stated = tt_ckpt.read_config(source)
    try:
        return tt_models.config_from_hf(stated)
    except ValueError as error:
        raise ValueError(f"{plain(source / 'config.json')}{str(error).removeprefix('config.json')}") from None


def saved_dtype(source: Path, device: torch.device) -> torch.dtype:
    """The dtype of most tensors in the files; fp16, in which CPUs do not compute well, is fp32 there."""
    counts = Counter(kind for kind in tt_ckpt.tensor_dtypes(source).values() if kind.is_floating_point)
    most = counts.most_common(1)[0][0] if counts else torch.bfloat16
    return torch.float32 if most == torch.float16 and device.type == "cpu" else most


def add_adapter_(model: tt_models.Decoder, origin: Origin) -> None:
    """Load the adapter of ``origin`` onto its base, in place; the base is resized or quantized as it needs."""
    assert origin.adapter is not None
    fit_vocabulary_(model, origin.adapter)
    tt_peft.load_adapter(model, origin.adapter, quantize_base=origin.nf4)


def check_tokens(model: tt_models.Decoder, tokenizer: Any, origin: Origin) -> None:
    """ConfigError if the tokenizer beside an adapter knows tokens that the model has no embedding for."""
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            [
                f"{origin.path}: its tokenizer has {tokenizer.vocab_size} tokens, the model {rows} embeddings, and the "
                f"adapter brings none for {rows} to {tokenizer.vocab_size - 1}; give the resized base that it was "
                "trained on: --base DIR"
            ]
        )


def load_stopped(
    origin: Origin,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    adapter: bool = True,
    model: tt_models.Decoder | None = None,
) -> tt_models.Decoder:
    """A run without results yet: its newest checkpoint over its base, which ``model`` is if given."""
    run = origin.stopped
    assert run is not None
    checkpoints = tt_ckpt.TrainCheckpoint(run.checkpoints)
    newest = checkpoints.latest()
    if newest is None:
        again = repeating(run.path, run.manifest)
        raise ConfigError([f"{run.path}: neither results nor a checkpoint; start it again from step 1: {again} -o NEW"])
    moved = [] if origin.model is None else [f"model.path={origin.model}"]
    config = run.compose(f"device={device}", *moved)
    dtype = dtype or DTYPES[config.model.dtype]
    saved = checkpoints.restore(newest)
    if model is not None:
        pass
    elif origin.model is not None:
        model = load_base(origin.model, device=device, dtype=dtype)
    else:
        torch.manual_seed(config.seed)
        hf_config = read_hf_config(config, None)
        model = tt_models.build(tt_models.config_from_hf(hf_config), device=device, dtype=dtype)
    if adapter and config.adapter is not None:
        lora = lora_config(config.adapter)
        tt_peft.apply_lora_(model, lora.with_(quantize_base=origin.nf4))
        tt_peft.load_adapter_state_(model, saved.tensors["adapter"])
    elif adapter:
        lost = saved.tensors.get("lost_bits", {})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weight = saved.tensors["model"][name]
                parameter.copy_(join(weight, lost[name]) if name in lost else weight)  # rounded once, or not at all
    return model
