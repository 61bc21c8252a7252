"""The model and adapter that a config names: found, and tried without memory before weights load."""

import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

import tt_ckpt
import tt_models
import tt_peft
from tt_models.limits import gigabytes, refuse_too_large, total_memory, weight_bytes
from tt_peft import NF4Linear, QLoRALinear
from tt_train.config import AdapterSection, KDConfig, PreferenceSection, RunConfig
from tt_train.devices.sharding import ways
from tt_train.errors import ConfigError, shell_word
from tt_train.losses.table import REFERENCE_FREE
from tt_train.memory import DTYPES, KEEPS_BY_HOOKS, blocks
from tt_train.records.run_files import FinishedRun, read_json

NF4_BYTES = 0.5 + 1 / 64  # of a value: its four bits, and the scale of its block
STATE_BYTES = {"adamw8bit": 2, "adamw_fp8": 2, "adamw4bit": 1, "muon": 4}  # of a value that trains; AdamW: 8


class Processes(NamedTuple):
    """Of a run: all of them, and those on this machine."""

    all: int
    here: int


ONE_PROCESS = Processes(1, 1)


def model_folder(config: RunConfig) -> Path | None:
    """The folder of ``model.path``, if there is one."""
    return None if config.model.path is None else folder_of(config.model.path, key="model.path")


def folder_of(path: str, *, key: str) -> Path:
    """The folder of a model: itself, a run's full model, or a snapshot of a hub id. ``key`` is for errors."""
    if (run := FinishedRun.at(path)) is not None:
        if run.model is not None:
            return run.model.resolve()
        raise ConfigError(
            [f"{key}: {path} is a run that trained an adapter; merge it first: tt merge {shell_word(path)} -o DIR"]
        )
    return tt_ckpt.resolve(path)


def read_hf_config(config: RunConfig, model_path: Path | None) -> dict[str, Any]:
    """config.json of the model, or of the named size."""
    if model_path is not None:
        return tt_ckpt.read_config(model_path)
    assert config.model.name is not None
    return tt_models.config_to_hf(tt_models.get_config(config.model.name))


def lora_config(section: AdapterSection) -> tt_peft.LoRAConfig:
    """The adapter block as tt_peft knows it. A text may be names with commas between; any other is an expression."""
    targets = section.target_modules
    if isinstance(targets, str) and re.fullmatch(r"\s*[\w.-]+(\s*,\s*[\w.-]+)+\s*", targets):
        targets = [name.strip() for name in targets.split(",")]
    options = {key: value for key, value in asdict(section).items() if key not in ("path", "lora_plus_ratio")}
    return tt_peft.LoRAConfig(**options | {"target_modules": targets, "dtype": DTYPES[section.dtype]})


def check_adapter(
    config: RunConfig, model_config: Any, device: torch.device | None, notes: list[str], *, processes: Processes | None
) -> tt_peft.LoRAConfig | None:
    """The LoRAConfig, if any, tried on a model without memory: a target that matches nothing, and a model that the
    devices of the processes cannot hold, are found here. None: the run will be on another machine."""
    section, model = config.adapter, tt_models.build(model_config, device="meta")
    if wrong := activation_mistakes(model, config, device, notes):
        raise ConfigError(wrong)
    if section is None:
        if processes is not None:
            check_memory(model, config, device, notes, processes=processes)
        return None
    lora = lora_config(section)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tt_peft.apply_lora_(model, lora)
    if said:
        more = f" (and {len(said) - 1} more such modules)" if len(said) > 1 else ""
        notes.append(f"adapter: {said[0].message}{more}")
    if processes is not None:
        check_memory(model, config, device, notes, processes=processes)
    if section.quantize_base and device is not None and device.type != "cpu":
        _try_nf4(device)
    if section.path is not None:
        _try_adapter(model, section, Path(section.path))
    return lora


def _try_nf4(device: torch.device) -> None:
    """ConfigError if a device cannot multiply with weights of 4 bits."""
    try:
        probe = nn.Sequential(nn.Linear(64, 64, bias=False)).to(device)
        tt_peft.quantize_nf4_(probe)
        probe(torch.ones(1, 64, device=device))
    except (RuntimeError, TypeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            [f"adapter.quantize_base: {device} cannot do NF4: {why}; use device=cpu, or quantize_base=false"]
        ) from error


def _try_adapter(model: tt_models.Decoder, section: AdapterSection, folder: Path) -> None:
    """ConfigError, ValueError if the adapter that training starts from does not fit the one of the config."""
    if not (folder / "adapter_config.json").is_file():
        near = folder / "adapter" if (folder / "adapter" / "adapter_config.json").is_file() else None
        cure = f"did you mean {near}?" if near else "give the folder of an adapter"
        raise ConfigError([f"adapter.path: {folder} has no adapter_config.json; {cure}"])
    settings = read_json(folder / "adapter_config.json")
    unlike = _unlike(section, settings)
    if settings.get("modules_to_save") or settings.get("trainable_token_indices"):
        if unlike and not settings.get("rank_pattern") and not settings.get("alpha_pattern"):
            raise ConfigError(unlike)
        return  # what else could be wrong needs the weights of the base
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.requires_grad for parameter in own):
            module.to_empty(device="cpu", recurse=False)
    try:
        tt_peft.load_adapter(model, folder)
    except ValueError as error:
        raise ConfigError(unlike or [f"adapter.path: {error}"]) from error


# the settings that an adapter must share with its file, under their names there
_IN_FILE = {"r": "rank", "lora_alpha": "alpha", "use_dora": "use_dora", "use_rslora": "use_rslora",
            "target_modules": "target_modules", "modules_to_save": "modules_to_save"}  # fmt: skip


def _unlike(section: AdapterSection, settings: dict[str, Any]) -> list[str]:
    """A line for each key that differs from the ``adapter_config.json`` at ``adapter.path``, with what to write."""
    found = []
    for theirs, ours in _IN_FILE.items():
        there, here = settings.get(theirs), getattr(section, ours)
        if isinstance(there, list):
            there = sorted(map(str, there))
        if there != (sorted(here) if isinstance(here, list) else here) and (there or here):
            word = yaml.safe_dump(there, default_flow_style=True, width=10**6).splitlines()[0]
            found.append(f"adapter.{ours}: adapter.path has {word}; write {shell_word(f'adapter.{ours}={word}')}")
    return found


def check_memory(
    model: nn.Module, config: RunConfig, device: torch.device | None, notes: list[str], *, processes: Processes
) -> None:
    """ConfigError if the weights alone of ``model`` (on the meta device) are more than the device has in all; a note if
    what trains takes more with its gradients and AdamW's moments.

    Each process has its shard of them. Processes on a CPU, and shards that are offloaded to it, share its memory. A
    teacher is whole in each process, a frozen copy of the model is sharded as the model is.
    """
    if device is None:
        return
    try:
        shards = ways(config, processes.all)[1]
    except ValueError:  # components.mistakes names it
        return
    offloaded = shards > 1 and config.parallel.cpu_offload
    home = torch.device("cpu") if offloaded else device
    together = processes.here if home.type == "cpu" else 1
    teacher = 0 if offloaded else _teacher_bytes(config)
    quantized = {id(m.weight) for m in model.modules() if isinstance(m, NF4Linear | QLoRALinear)}
    width = 2 if config.model.dtype == "bf16" else 4
    frozen = trained = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel() * (NF4_BYTES if id(parameter) in quantized else width)
    count = sum(parameter.numel() for parameter in model.parameters())
    loss = config.loss
    compares = isinstance(loss, PreferenceSection) and loss.name not in REFERENCE_FREE and loss.reference_cache is None
    if compares and config.adapter is None:
        frozen += count * width  # a frozen copy of the whole model
    cure = "take a smaller model" if not teacher else "take a smaller model or teacher"
    if config.adapter is None:
        cure = f"train an adapter (adapter.rank=8) or {cure}"
    elif not config.adapter.quantize_base:
        cure = f"set adapter.quantize_base=true, lower adapter.rank or {cure}"
    try:
        refuse_too_large(
            f"a model of {count:,} parameters{' with its teacher' if teacher else ''}"
            f"{f' in {together} processes' if together > 1 else ''} (its weights alone)",
            int(together * ((frozen + 4 * trained) / shards + teacher)),
            home,
            cure,
        )
    except ValueError as error:
        raise ConfigError([f"model: {error}"]) from None
    each = 4 + (0 if config.optimizer_in_backward else 4) + STATE_BYTES.get(config.optimizer.name, 8)
    about, total = int(together * ((frozen + each * trained) / shards + teacher)), total_memory(home)
    if total is not None and about > total:
        notes.append(
            f"memory: weights, gradients and the optimizer's state take about {gigabytes(about)}, {home} has "
            f"{gigabytes(total)}; {cure}"
        )


def teacher_shape(config: KDConfig) -> tt_models.Decoder:
    """The teacher on the meta device."""
    assert config.kd.teacher is not None
    shape = tt_models.config_from_hf(tt_ckpt.read_config(folder_of(config.kd.teacher, key="kd.teacher")))
    return tt_models.build(shape, device="meta", dtype=DTYPES[config.kd.teacher_dtype]).requires_grad_(False)


def _teacher_bytes(config: RunConfig) -> int:
    """Of the weights of the teacher, if there is one. One that cannot be read has none: methods.py names it."""
    if not isinstance(config, KDConfig) or config.kd.teacher is None:
        return 0
    try:
        return weight_bytes(teacher_shape(config))
    except (ConfigError, ValueError, OSError):
        return 0


def activation_mistakes(
    model: nn.Module, config: RunConfig, device: torch.device | None, notes: list[str]
) -> list[str]:
    """A line for each way of keeping activations that this model or device does not have."""
    how, num, found = config.activation_checkpointing, len(blocks(model)), []
    if how == "selective" and (why := _without_kernel(model, config, device)):
        found.append(f"activation_checkpointing: selective has nothing to keep, {why}; use full")
    if not isinstance(how, bool | str) and how > num:
        found.append(f"activation_checkpointing: every block number {how} is asked for, the model has {num}")
    if config.activation_offloading and device is not None and device.type == "cpu":
        notes.append("activation_offloading: has no effect on the CPU, where all activations are already")
    elif config.activation_offloading and how == "selective" and not KEEPS_BY_HOOKS:
        found.append(
            f"activation_offloading: torch {torch.__version__} leaves on the device what "
            "activation_checkpointing=selective keeps; use full, or torch 2.14"
        )
    return found


def _without_kernel(model: nn.Module, config: RunConfig, device: torch.device | None) -> str | None:
    """Why the attention of a model is more than one operation, whose result could be kept; None if it is one."""
    attentions: list[Any] = [block.self_attn for block in blocks(model)]
    kind = device.type if device is not None else "cpu"
    if kind != "cpu" and any(attention.softcap is not None or attention.sinks is not None for attention in attentions):
        return "since this model bounds its attention scores or has sinks"
    if any(attention.dropout for attention in attentions) and kind == "cpu":
        return "since on the CPU attention with dropout is no single operation"
    if kind == "cuda" and (config.data.packing or any(attention.window for attention in attentions)):
        return "since on CUDA packed rows and windows use flex_attention"
    return None


def vocabulary_mistakes(tokenizer: Any, model_config: Any) -> list[str]:
    """Tokens that the embedding has no row for."""
    if tokenizer.vocab_size <= model_config.vocab_size:
        return []
    first, last = model_config.vocab_size, tokenizer.vocab_size - 1
    return [
        f"model: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {first}; ids {first} to "
        f"{last} have no embedding; use the model's own tokenizer"
    ]


def check_headers(model_config: tt_models.ModelConfig, model_path: Path | None) -> None:
    """ValueError, FileNotFoundError if names or shapes are not the model's, or a file is not whole."""
    if model_path is not None:
        tt_ckpt.check_weights(tt_models.build(model_config, device="meta"), model_path)
