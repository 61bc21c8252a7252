"""A model and its tokenizer from a run directory, a model directory, an adapter or a hub id."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_ckpt.hf.stored_tensors import open_tensors
from tt_ckpt.hf.weights import EMBEDDING
from tt_ckpt.shown import plain
from tt_models.limits import refuse_too_large, weight_bytes
from tt_peft.adapter_files.folder import WEIGHTS_FILE, read_adapter_config, read_adapter_weights
from tt_train.errors import ConfigError
from tt_train.inputs.model import lora_config, read_hf_config
from tt_train.memory import DTYPES
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.optim.master_weights import join
from tt_train.quantized.stored import expect_, is_torchao
from tt_train.quantized.trial import computing_problem
from tt_train.settings.recipe_file import repeating

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    adapter: bool = True,
    base: Base = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[tt_models.Decoder, tt_data.Tokenizer]:
    """The model at ``path``, in evaluation mode, and its tokenizer (with the template that a run was trained with).

    Tokenizer, chat template and generation settings beside a run or adapter take precedence over those of its base.

    Args:
        path: a run directory (its model, or its base with its adapter; a stopped run: its newest checkpoint), a
            Hugging Face model directory, a PEFT adapter directory, or a hub id.
        device: what torch.accelerator finds (a GPU, XPU or MPS), else the CPU.
        dtype: that of the run or of the files by default; on a CPU, fp16 files become fp32.
        adapter: False gives the base model of a run or adapter.
        base: the directory of a base that has moved, ``nf4`` or ``dense``, or both; see ``find_origin``.
        tell: is called with a sentence that says how the base is loaded, if the adapter was trained on a 4-bit base,
            and which checkpoint is loaded, if the run has no result.

    Raises:
        ConfigError, ValueError, FileNotFoundError: what is missing, and how to fix it.
    """
    origin = find_origin(path, base)
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    dtype = dtype or DTYPES.get(str(origin.settings.get("dtype")))
    if tell is not None and origin.base_words is not None and adapter:
        tell(origin.base_words)
    if origin.stopped is not None:
        model = load_stopped(origin, device, dtype=dtype, adapter=adapter, tell=tell)
    else:
        assert origin.model is not None  # only a stopped run may have none
        model = load_base(origin.model, device=device, dtype=dtype)
    tokenizer = load_tokenizer(origin)
    if adapter and origin.adapter is not None:
        add_adapter_(model, tokenizer, origin)
    return model.eval(), tokenizer


def load_base(source: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> tt_models.Decoder:
    """A Hugging Face model directory as one of our models; ``dtype``: ``saved_dtype`` by default."""
    if is_torchao(tt_ckpt.read_config(source)):
        return load_quantized(source, device=device, dtype=dtype)
    dtype = dtype or saved_dtype(source, device)
    model = tt_models.build(model_config(source), device="meta", dtype=dtype)
    refuse_too_large(f"{source}: the model", weight_bytes(model), device, "use a smaller model, or a larger machine")
    tt_ckpt.load_weights(model, source, dtype=dtype, device=device)
    return model.eval()


def load_quantized(
    source: Path, *, device: torch.device, dtype: torch.dtype | None = None, as_dense: bool = False
) -> tt_models.Decoder:
    """A directory whose linear layers torchao has quantized, as ``tt quantize`` or transformers wrote it.

    Weights keep the form in which files have them, and so does the memory that they need; ``as_dense`` gives a plain
    model in fp32 instead, of the matrices that they stand for. ConfigError for another
    ``dtype`` than that of the directory, and for a format whose kernels this machine does not have.
    """
    tensors = open_tensors(source)
    model = tt_models.build(model_config(source, quantized=True), device="meta")
    names = expect_(model, tensors, as_dense=as_dense)
    stored = tensors.specs[EMBEDDING].dtype if EMBEDDING in tensors.specs else None
    if dtype not in (None, stored):
        asked, kept = (str(kind).removeprefix("torch.") for kind in (dtype, stored))
        raise ConfigError([f"{source}: its weights are quantized and compute in {kept}, not in {asked}"])
    refuse_too_large(f"{source}: the model", tensors.nbytes, device, "use a smaller model, or a larger machine")
    tt_ckpt.load_weights(model, source, device=device)
    model = model.eval().requires_grad_(False)
    if as_dense:
        return model.float()
    layer = model.get_submodule(names[0].removesuffix(".weight"))
    if problem := computing_problem(layer, stored or torch.bfloat16, device):
        raise ConfigError([f"{source}: {problem}"])
    return model


def model_config(source: Path, *, quantized: bool = False) -> tt_models.ModelConfig:
    """The config of a Hugging Face model directory, read strictly; ValueError names the file.

    ``quantized``: accept weights that torchao has quantized.
    """
    stated = tt_ckpt.read_config(source)
    if quantized and is_torchao(stated):
        stated = {key: value for key, value in stated.items() if key != "quantization_config"}
    try:
        return tt_models.config_from_hf(stated)
    except ValueError as error:
        raise ValueError(f"{plain(source / 'config.json')}{str(error).removeprefix('config.json')}") from None


def saved_dtype(source: Path, device: torch.device) -> torch.dtype:
    """The dtype of most tensors in the files; on a CPU, fp32 in place of fp16, in which CPUs are slow."""
    counts = Counter(kind for kind in tt_ckpt.tensor_dtypes(source).values() if kind.is_floating_point)
    most = counts.most_common(1)[0][0] if counts else torch.bfloat16
    return torch.float32 if most == torch.float16 and device.type == "cpu" else most


def add_adapter_(model: tt_models.Decoder, tokenizer: tt_data.Tokenizer, origin: Origin) -> None:
    """Load the adapter of ``origin`` onto its base, in place. The base is resized or quantized first if needed.

    ConfigError if the tokenizer beside the adapter has tokens without an embedding.
    """
    assert origin.adapter is not None
    fit_vocabulary_(model, origin.adapter)
    tt_peft.load_adapter(model, origin.adapter, quantize_base=origin.nf4)
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            [
                f"{origin.path}: its tokenizer has {tokenizer.vocab_size} tokens, the model {rows} embeddings, and the "
                f"adapter adds none for {rows} to {tokenizer.vocab_size - 1}; give the resized base that it was "
                "trained on: --base DIR"
            ]
        )


@torch.no_grad()
def fit_vocabulary_(model: tt_models.Decoder, adapter: Path) -> None:
    """Resize the vocabulary of ``model`` to that of the whole embeddings in the adapter folder, in place.

    The new rows come from the adapter's file; in a tied model, all rows do. Does nothing if the adapter has no whole
    embeddings, or if they have the size of the model's.
    """
    file = adapter / WEIGHTS_FILE
    if not file.is_file():
        return  # load_adapter reports what is there
    state, _ = read_adapter_weights(adapter)
    whole: dict[str, torch.Tensor] = {}
    for name in (_EMBEDDING, _HEAD):
        for below in ("token_adapter.base_layer.", "base_layer.", "modules_to_save.", ""):  # the later one counts
            whole |= {name: state[key]} if (key := f"{name}.{below}weight") in state else {}
    here, tied = model.config.vocab_size, model.config.tie_word_embeddings
    grown = max((len(tensor) for tensor in whole.values()), default=here)
    if grown <= here:
        return
    names = [_EMBEDDING] if tied else [_EMBEDDING, _HEAD]
    for name in names:
        if name not in whole or len(whole[name]) != grown:
            raise ConfigError(
                [
                    f"{file}: its vocabulary was resized from {here} to {grown} rows, but it contains no {name} of "
                    "that size; give the resized base that it was trained on: --base DIR"
                ]
            )
    if tied and not torch.equal(whole[_EMBEDDING], whole.get(_HEAD, whole[_EMBEDDING])):
        saved = read_adapter_config(adapter).get("modules_to_save") or ()
        if not _EMBEDDING.endswith(tuple(saved)):
            raise ConfigError(
                [
                    f"{file}: its vocabulary was resized from {here} to {grown} rows; {_EMBEDDING} and {_HEAD} differ, "
                    "but the model ties them (tie_word_embeddings); give a base with a separate output projection: "
                    "--base DIR"
                ]
            )
        whole[_EMBEDDING] = whole[_HEAD]  # the output projection's; what the embedding learned comes with the adapter
    for name in names:
        module = model.get_submodule(name)
        old = module.get_parameter("weight")
        new = whole[name].to(old.device, old.dtype, copy=True)
        if not tied:
            new[:here] = old  # load_adapter replaces them by those of the file, in its precision
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", grown)
    model.config = replace(model.config, vocab_size=grown)


def load_stopped(
    origin: Origin,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    adapter: bool = True,
    model: tt_models.Decoder | None = None,
    tell: Callable[[str], None] | None = None,
) -> tt_models.Decoder:
    """The model of a run without a result: its newest checkpoint, loaded onto ``model`` or onto the base."""
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
    if adapter and tell is not None:
        tell(f"{run.path} has no result yet; this is its checkpoint of step {saved.step}")
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
        lost = saved.tensors.get("lost_bits", dict[str, torch.Tensor]())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weight = saved.tensors["model"][name]
                parameter.copy_(join(weight, lost[name]) if name in lost else weight)  # rounded once, or not at all
    return model
