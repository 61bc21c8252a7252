"""Adapter folders as PEFT writes and reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tt_peft.apply import (
    adapted_modules,
    adapter_names,
    adapter_state_dict,
    apply_lora_,
    load_adapter_state_,
    own_module_names,
    target_names,
)
from tt_peft.config import LoRAConfig
from tt_peft.fingerprint import difference, encode, fingerprint
from tt_peft.lora import LowRank
from tt_peft.peft_config import config_from_peft, config_to_peft

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_KEY = "tt_base"


def save_adapter(
    model: nn.Module, path: str | Path, *, base_model: str | None = None, adapter: str = "default"
) -> Path:
    """Write one adapter as a folder that ``peft`` loads. Returns the folder.

    ``base_model`` is the name or path of the base model (default: the model's own ``config._name_or_path``, if any).
    What tells the base from others goes into the file's metadata, so that ``load_adapter`` can refuse another base.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    base_model = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    tensors = {_PREFIX + k: _whole(t) for k, t in adapter_state_dict(model, adapter).items()}
    metadata = {"format": "pt", _BASE_KEY: encode({"base_model": base_model, **fingerprint(model)})}
    _write(folder / WEIGHTS_FILE, save(tensors, metadata))
    names = [n for n, m in adapted_modules(model).items() if adapter in m.adapters]
    settings = config_to_peft(adapter_config(model, adapter), names, own_module_names(model), base_model)
    _write(folder / CONFIG_FILE, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return folder


def adapter_config(model: nn.Module, adapter: str = "default") -> LoRAConfig:
    """The config with which an adapter was applied."""
    for module in adapted_modules(model).values():
        if adapter in module.adapters:
            low_rank = module.adapters[adapter]
            assert isinstance(low_rank, LowRank)
            return low_rank.spec.config
    raise ValueError(f"the model has no adapter {adapter!r}; it has: {', '.join(adapter_names(model)) or 'none'}")


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str = "default",
    base_model: str | None = None,
    check_base: bool = True,
) -> LoRAConfig:
    """Load an adapter folder, ours or one that ``peft`` wrote; returns its config.

    Where the model has no adapter of that name, one is applied as ``adapter_config.json`` says. An adapter of another
    base (other shapes, other values, or another ``base_model`` name) is a ValueError unless ``check_base=False``.
    """
    folder = Path(path)
    settings = read_adapter_config(folder)
    state, metadata = read_adapter_weights(folder)
    if check_base:
        _check_base(model, folder, settings, metadata, base_model)
    config = config_from_peft(settings, folder / CONFIG_FILE)
    if adapter not in adapter_names(model):
        _check_targets(model, config, state, folder)
        apply_lora_(model, config, adapter=adapter)
    try:
        load_adapter_state_(model, state, adapter=adapter)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from None
    return config


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter folder."""
    folder, file = Path(folder), Path(folder) / CONFIG_FILE
    if not file.is_file():
        present = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{file} not found: not an adapter folder (there is: {present or 'nothing'})")
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(settings).__name__}")
    return settings


def read_adapter_weights(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter folder without the ``base_model.model.`` prefix, and the file's metadata."""
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        pickled = (Path(folder) / "adapter_model.bin").is_file()
        why = ": adapter_model.bin is a pickle, which can run code; save it again with safe_serialization=True"
        raise FileNotFoundError(f"{file} not found{why if pickled else ''}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key.removeprefix(_PREFIX): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({file.stat().st_size} bytes): {error}") from None


def _check_base(
    model: nn.Module, folder: Path, settings: dict[str, Any], metadata: dict[str, str], base_model: str | None
) -> None:
    trained_on = settings.get("base_model_name_or_path")
    here = base_model or getattr(getattr(model, "config", None), "_name_or_path", None)
    title = f"{folder}: this adapter was trained on {trained_on or 'another base'}"
    if _BASE_KEY in metadata:
        try:
            saved = json.loads(metadata[_BASE_KEY])
        except ValueError:
            raise ValueError(f"{folder / WEIGHTS_FILE}: the metadata {_BASE_KEY!r} is not valid JSON") from None
        different = difference(saved, model)
        if different:
            raise ValueError(f"{title}, but the model here{f' ({here})' if here else ''} is another: {different}")
    elif base_model and trained_on and Path(base_model).name != Path(trained_on).name:
        raise ValueError(f"{title}, but the model here is {base_model}; pass check_base=False if they are the same")


def _check_targets(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor], folder: Path) -> None:
    """An adapter file for more or fewer layers than the model has is of another base."""
    try:
        wanted = set(target_names(model, config))
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    found = {key.rsplit(".lora_", 1)[0] for key in state if ".lora_" in key}
    for title, names in (("has no weights for", wanted - found), ("has weights for unknown", found - wanted)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(sorted(names)[:3])
            raise ValueError(f"{folder}: the adapter is of another base: it {title} {listed}{more}")


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every rank must call), on the CPU."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = gather() if gather is not None else tensor
    return whole.detach().cpu().contiguous()


def _write(file: Path, content: bytes) -> None:
    """Replace the file in one step: a reader or a crash sees the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
