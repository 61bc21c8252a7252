"""A model and its tokenizer from a run directory, a model directory, an adapter or a hub id."""

from pathlib import Path
from typing import Any

import torch

import tt_ckpt
import tt_data
import tt_models
import tt_peft
from tt_train.errors import ConfigError
from tt_train.run_dir import find_run, is_run, read_json
from tt_train.serving import run_template


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    adapter: bool = True,
) -> tuple[tt_models.Decoder, Any]:
    """The model at ``path``, in evaluation mode, and its tokenizer (with the template that a run was trained with).

    Args:
        path: a run directory (its model, or its base with its adapter; a stopped run: its newest checkpoint), a
            Hugging Face model directory, a PEFT adapter directory, or a hub id.
        device: the GPU where there is one, else the CPU.
        dtype: the run's or config.json's own by default.
        adapter: False gives the base model of a run or adapter.

    Raises:
        ConfigError, ValueError, FileNotFoundError: with what is missing and the cure.
    """
    folder = Path(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, _adapter_base(folder), device, dtype, adapter)
    if is_run(folder):
        return _load_run(find_run(folder), device, dtype, adapter)
    source = tt_ckpt.resolve(str(path))
    return load_base(source, device=device, dtype=dtype), tt_data.load_tokenizer(source)


def load_base(source: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> tt_models.Decoder:
    """A Hugging Face model directory as one of our models."""
    hf_config = tt_ckpt.read_config(source)
    dtype = dtype or saved_dtype(hf_config)
    model = tt_models.build(tt_models.config_from_hf(hf_config), device="meta", dtype=dtype)
    tt_ckpt.load_weights(model, source, dtype=dtype, device=device)
    return model.eval()


def saved_dtype(hf_config: dict[str, Any]) -> torch.dtype:
    """The dtype that config.json names (either generation of the key); bf16 where it is fp16 or absent."""
    name = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return torch.float32 if name == "float32" else torch.bfloat16


def _adapter_base(folder: Path) -> str:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            [f"{folder}: adapter_config.json names no base model; load the base and call tt_peft.load_adapter"]
        )
    return str(base)


def _load_adapter(
    folder: Path,
    base: str,
    device: torch.device,
    dtype: torch.dtype | None,
    adapter: bool,
    tokenizer: str | None = None,
) -> tuple[tt_models.Decoder, Any]:
    source = tt_ckpt.resolve(base)
    model = load_base(source, device=device, dtype=dtype)
    if adapter:
        tt_peft.load_adapter(model, folder)
    return model.eval(), tt_data.load_tokenizer(tokenizer or source)


def _load_run(
    run: Path, device: torch.device, dtype: torch.dtype | None, adapter: bool
) -> tuple[tt_models.Decoder, Any]:
    model, tokenizer = _load_trained(run, device, dtype, adapter)
    return model, tt_data.choose_template(tokenizer, run_template(run))


def _load_trained(
    run: Path, device: torch.device, dtype: torch.dtype | None, adapter: bool
) -> tuple[tt_models.Decoder, Any]:
    section = (read_json(run / "manifest.json").get("config") or {}).get("model") or {}
    dtype = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}.get(str(section.get("dtype")))
    if (run / "adapter" / "adapter_config.json").is_file():
        base = _adapter_base(run / "adapter")
        return _load_adapter(run / "adapter", base, device, dtype, adapter, section.get("tokenizer"))
    if (run / "model" / "config.json").is_file():
        model = load_base(run / "model", device=device, dtype=dtype)
        return model, tt_data.load_tokenizer(run / "model")
    return _load_stopped(run, device, adapter)


def _load_stopped(run: Path, device: torch.device, adapter: bool) -> tuple[tt_models.Decoder, Any]:
    """A run without results yet: its newest checkpoint over its base."""
    from tt_train.composing import compose
    from tt_train.recipes import _assemble

    checkpoints = tt_ckpt.TrainCheckpoint(run / "checkpoints")
    newest = checkpoints.latest()
    if newest is None:
        raise ConfigError(
            [f"{run}: neither results nor a checkpoint; go on with: tt run {run}/config.yaml -o {run} --resume auto"]
        )
    config = compose(run / "config.yaml", overrides=[f"device={device}"])
    model_path = _assemble.model_folder(config)
    hf_config = _assemble.read_hf_config(config, model_path)
    model_config = tt_models.config_from_hf(hf_config)
    dtype = _assemble.DTYPES[config.model.dtype]
    saved = checkpoints.restore(newest)
    if model_path is not None:
        model = load_base(model_path, device=device, dtype=dtype)
    else:
        torch.manual_seed(config.seed)
        model = tt_models.build(model_config, device=device, dtype=dtype)
    if adapter and config.adapter is not None:
        tt_peft.apply_lora_(model, _assemble.lora_config(config.adapter))
        tt_peft.load_adapter_state_(model, saved.tensors["adapter"])
    elif adapter:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved.tensors["model"][name])
    source = config.model.tokenizer or model_path
    assert source is not None  # compose has seen to it
    return model.eval(), tt_data.load_tokenizer(source)
