"""Adapter folders as PEFT writes and reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tt_peft.apply import apply_lora_, spec_of, stacked_names, target_names
from tt_peft.config import LoRAConfig
from tt_peft.fingerprint import difference, encode, fingerprint
from tt_peft.lora import LoRAEmbedding, LoRALinear
from tt_peft.lowrank import low_ranks, whole
from tt_peft.peft_config import Members, config_from_peft, config_to_peft
from tt_peft.saved import SavedModule
from tt_peft.stacked import StackedLoRA
from tt_peft.state import adapter_state_dict, entries, load_adapter_state_
from tt_peft.switch import (
    active_adapters,
    adapter_config,
    adapter_names,
    modules_of,
    remove_adapter_,
    set_adapter_,
    unwrapped,
)
from tt_peft.targets import check_expression, matches, output_projection_names, own_modules

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_KEY = "tt_base"
_START = (".start_A.weight", ".start_B.weight")


def save_adapter(
    model: nn.Module, path: str | Path, *, base_model: str | None = None, adapter: str = "default"
) -> Path:
    """Write one adapter as a folder that ``peft`` loads. Returns the folder.

    ``base_model`` is the name or path of the base model (default: the model's own ``config._name_or_path``, if any).
    What tells the base from others goes into the file's metadata, so that ``load_adapter`` can refuse another base.
    Of a sharded model every rank must call this; rank 0 writes.
    """
    folder = Path(path)
    base_model = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    state = adapter_state_dict(model, adapter)
    sharded = any(hasattr(tensor, "device_mesh") for tensor in state.values())
    tensors = {_PREFIX + key: _for_file(tensor) for key, tensor in without_start(state).items()}
    if sharded and torch.distributed.get_rank() != 0:
        return folder
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    metadata = {"format": "pt", _BASE_KEY: encode({"base_model": base_model, **fingerprint(model)})}
    _write(folder / WEIGHTS_FILE, _sorted_header(save(tensors, metadata)))
    settings = config_to_peft(adapter_config(model, adapter), _members(model, adapter), base_model)
    _write(folder / CONFIG_FILE, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return folder


def without_start(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter counted from the untouched base: what PiSSA started from becomes more rank: ``[A; A0] [B, -B0]``."""
    plain = {key: tensor for key, tensor in state.items() if not key.endswith(_START)}
    for key, start in state.items():
        if key.endswith(_START[0]):
            own = key.removesuffix(_START[0]) + ".lora_A.weight"
            plain[own] = torch.cat([whole(state[own]), whole(start)])
        elif key.endswith(_START[1]):
            own = key.removesuffix(_START[1]) + ".lora_B.weight"
            plain[own] = torch.cat([whole(state[own]), -whole(start)], dim=1)
    return plain


def _members(model: nn.Module, adapter: str) -> Members:
    """The names that an adapter's config file must mention."""
    modules = modules_of(model, adapter)
    return Members(
        linear=[name for name, m in modules.items() if isinstance(m, LoRALinear | LoRAEmbedding)],
        stacked=[f"{n}.{x}" for n, m in modules.items() if isinstance(m, StackedLoRA) for x in low_ranks(m, adapter)],
        saved=[name for name, m in modules.items() if isinstance(m, SavedModule)],
        everything=list(own_modules(model)),
        causal_lm=_is_causal_lm(unwrapped(model)),
    )


def _is_causal_lm(model: nn.Module) -> bool:
    """PEFT asks what it wraps as one to generate: a classifier or an encoder of transformers cannot."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    generates = hasattr(model, "prepare_inputs_for_generation") or not hasattr(model, "get_output_embeddings")
    return bool(output_projection_names(model)) and generates and not encodes


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str = "default",
    base_model: str | None = None,
    check_base: bool = True,
    quantize_base: bool = False,
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
    _check_finite(state, folder)
    state = _without_base_copies(model, state, folder)
    config = config_from_peft(settings, folder / CONFIG_FILE).with_(quantize_base=quantize_base)
    config = _as_here(model, config, folder)
    _check_targets(model, config, state, folder, tied=settings.get("ensure_weight_tying") is True)
    fresh = adapter not in adapter_names(model)
    active, trained = active_adapters(model), [p for p in model.parameters() if p.requires_grad]
    if fresh:
        apply_lora_(model, config, adapter=adapter)
    else:
        _check_same(model, config, adapter, folder)
    own = {entry.key: entry.parameter.detach() for entry in entries(model, adapter)}
    starts = {key: value for key, value in own.items() if key.endswith(_START) and key not in state}
    try:
        load_adapter_state_(model, {**state, **starts}, adapter=adapter)
    except ValueError as error:
        if fresh:
            remove_adapter_(model, adapter)
            set_adapter_(model, active)
            for parameter in trained:
                parameter.requires_grad_(True)
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
    except (ValueError, RecursionError) as error:
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
            different = difference(json.loads(metadata[_BASE_KEY]), model)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{folder / WEIGHTS_FILE}: the metadata {_BASE_KEY!r} is damaged") from None
        if different:
            raise ValueError(f"{title}, but the model here{f' ({here})' if here else ''} is another: {different}")
    elif base_model and trained_on and Path(base_model).name != Path(str(trained_on)).name:
        raise ValueError(f"{title}, but the model here is {base_model}; pass check_base=False if they are the same")


def _without_base_copies(model: nn.Module, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """PEFT puts the base of adapted embeddings into the file as well; that must be what the model has."""
    kept = {}
    for key, tensor in state.items():
        owner, found, local = key.rpartition(".base_layer.")
        if not found or ".lora_" in key:
            kept[key] = tensor
            continue
        own = dict(model.named_parameters(remove_duplicate=False)).get(f"{owner}.{local}")
        if own is not None and own.shape != tensor.shape:
            raise ValueError(f"{folder}: {key} has shape {list(tensor.shape)}, the base has {list(own.shape)}")
        if own is not None and not own.is_meta and not torch.allclose(own.float().cpu(), tensor.float(), rtol=1e-2):
            raise ValueError(f"{folder}: {key} holds other base weights than the model: another base, or a changed one")
    return kept


def _as_here(model: nn.Module, config: LoRAConfig, folder: Path) -> LoRAConfig:
    """The config without what means nothing in this model, and ``modules_to_save`` in full names.

    PEFT passes over names that match nothing (its classifiers always have "classifier" and "score" to save), so a
    file may hold some; ``_check_targets`` compares what is left with the weights. PEFT reads ``modules_to_save`` as
    endings, not as whole parts: "norm" means "input_layernorm" too.
    """
    names, patterns = list(own_modules(model)), (config.rank_pattern, config.alpha_pattern)
    saved = tuple(name for name in names if name.endswith(config.modules_to_save))
    targets = config.target_modules
    try:
        if not isinstance(targets, str):
            targets = _known(targets, names) or targets  # of none that is known, the error names the nearest
        config = config.with_(target_modules=targets, exclude_modules=_known(config.exclude_modules, names))
        config = config.with_(modules_to_save=saved, rank_pattern={}, alpha_pattern={})
        adapted = target_names(model, config) + stacked_names(model, config)
        ranks, alphas = ({p: known[p] for p in _known(tuple(known), adapted)} for known in patterns)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    return config.with_(rank_pattern=ranks, alpha_pattern=alphas)


def _known(targets: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``targets`` that mean any of ``names``."""
    for target in targets:
        check_expression(target)
    return tuple(target for target in targets if any(matches(target, name) for name in names))


def _check_finite(state: dict[str, Tensor], folder: Path) -> None:
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{folder / WEIGHTS_FILE}: {key} is {tensor.dtype}, expected floating point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{folder / WEIGHTS_FILE}: {key} has NaN or infinite values: its training went wrong")


def _check_targets(model: nn.Module, config: LoRAConfig, state: dict[str, Tensor], folder: Path, *, tied: bool) -> None:
    """An adapter file for more or fewer layers than the model has is of another base."""
    stacked = {name.rpartition(".")[0] for name in stacked_names(model, config)}
    wanted, saved = {*target_names(model, config), *stacked}, config.modules_to_save
    found = {key.split(".lora_", 1)[0].replace(".base_layer", "") for key in state if ".lora_" in key}
    strangers = {key for key in state if ".lora_" not in key and not any(key.startswith(f"{name}.") for name in saved)}
    for title, names in (
        ("has no weights for", wanted - found),
        ("has weights for unknown", found - wanted | strangers),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(sorted(names)[:3])
            if tied and "unknown" in title:
                raise ValueError(f"{folder}: ensure_weight_tying=True is not supported; it {title} {listed}{more}")
            raise ValueError(f"{folder}: the adapter is of another base or kind: it {title} {listed}{more}")


def _check_same(model: nn.Module, config: LoRAConfig, adapter: str, folder: Path) -> None:
    """The model's adapter must compute with the numbers that the file's was trained with."""
    for name, module in modules_of(model, adapter).items():
        for local, low_rank in low_ranks(module, adapter).items():
            own, given = low_rank.spec, spec_of(f"{name}.{local}" if local else name, config)
            for what, here, there in (
                ("rank", own.rank, given.rank),
                ("scaling", own.scaling, given.scaling),
                ("use_dora", own.config.use_dora, given.config.use_dora),
            ):
                if here != there:
                    raise ValueError(f"{folder}: {what} is {there} for {name}, but the model's {adapter!r} has {here}")


def _for_file(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().cpu().contiguous()


def _sorted_header(content: bytes) -> bytes:
    """safetensors writes metadata in an order of its own at each call; equal adapters should be equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _write(file: Path, content: bytes) -> None:
    """Replace the file in one step: a reader or a crash sees the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o644)) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
