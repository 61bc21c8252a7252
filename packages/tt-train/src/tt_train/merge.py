"""A run's adapter merged into its base, as a Hugging Face directory that transformers, vLLM and llama.cpp read."""

from collections.abc import Callable
from pathlib import Path

import torch

import tt_ckpt
import tt_models
import tt_peft
from tt_train.errors import ConfigError
from tt_train.loading import load
from tt_train.run_dir import is_run, read_json
from tt_train.serving import run_template, run_tokenizer, serving_files, tokenizer_files


def merge_run(
    path: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, tell: Callable[[str], None] | None = None
) -> Path:
    """Write the merged model of a run or adapter to ``output``, which must be new or empty; returns it.

    What was written is read back and compared before it stands there. ``tell`` hears what merging cost in precision.
    """
    folder, target = Path(path), Path(output)
    refuse_full(target)
    model, tokenizer = load(path, dtype=dtype, device="cpu")
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        report = tt_peft.merge_lora_(model)
        if tell is not None:
            tell(str(report))
    source = model_source(folder)
    config = dict(tt_ckpt.read_config(source)) if source else tt_models.config_to_hf(model.config)
    files = tokenizer_files(run_tokenizer(folder)) | serving_files(tokenizer, run_template(folder), source)
    tt_ckpt.save_hf(model, target, config=config, source=source, files=files)
    return target


def refuse_full(target: Path) -> None:
    """ConfigError where writing to ``target`` would mix with what it holds."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError([f"{target}: exists and is not empty; choose another -o"])


def model_source(folder: Path) -> Path | None:
    """The Hugging Face directory under a run, adapter or model: where tokenizer files and config.json are."""
    if (folder / "adapter_config.json").is_file():
        return tt_ckpt.resolve(str(read_json(folder / "adapter_config.json")["base_model_name_or_path"]))
    if not is_run(folder):
        return tt_ckpt.resolve(str(folder))
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    section = (read_json(folder / "manifest.json").get("config") or {}).get("model") or {}
    return tt_ckpt.resolve(str(section["path"])) if section.get("path") else None
