"""Adapter folders as PEFT writes and reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tt_peft.adapter_files.checks import (
    BASE_KEY,
    as_here,
    check_amount,
    check_base_of,
    check_finite,
    check_ranks,
    check_same,
    check_targets,
    fingerprint,
    precise,
)  # fmt: skip
from tt_peft.adapter_files.embeddings import take_embeddings
from tt_peft.adapter_files.files import HEADER_BYTES, read_json, read_start, write
from tt_peft.adapter_files.peft_config import Members, config_from_peft, config_to_peft
from tt_peft.adapter_files.state import adapter_state_dict, entries, load_adapter_state_
from tt_peft.apply import apply_lora_
from tt_peft.config import LoRAConfig
from tt_peft.full_modules import SavedModule
from tt_peft.lora import LoRAEmbedding, LoRALinear
from tt_peft.lowrank import is_sharded, low_ranks, whole
from tt_peft.modules import output_projection_names, own_modules, tied_embedding
from tt_peft.shown import listed, plain, shown
from tt_peft.stacked import StackedLoRA
from tt_peft.switch import (
    active_adapters,
    adapter_config,
    adapter_names,
    clean_name,
    modules_of,
    remove_adapter_,
    set_adapter_,
    unwrapped,
)  # fmt: skip

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMED = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.default(\.weight)?$")
LONGEST_NAME = 500  # characters of a tensor's name
_START = (".start_A.weight", ".start_B.weight")


def save_adapter(
    model: nn.Module, path: str | Path, *, base_model: str | None = None, adapter: str = "default"
) -> Path:
    """Write one adapter as a folder that ``peft`` loads. Returns the folder.

    ``base_model`` is the name or path of the base model (default: the model's own ``config._name_or_path``, if any).
    A fingerprint of the base goes into the metadata of the file, so that ``load_adapter`` can refuse a different base.
    Of a sharded model every rank must call this; rank 0 writes.
    """
    folder = Path(path)
    base_model = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    state = adapter_state_dict(model, adapter)
    sharded = any(is_sharded(tensor) for tensor in state.values())
    tensors = {_PREFIX + key: whole(tensor).detach().cpu().contiguous() for key, tensor in without_start(state).items()}
    base = json.dumps({"base_model": base_model, **fingerprint(model)}, separators=(",", ":"), sort_keys=True)
    if sharded and torch.distributed.get_rank() != 0:
        return folder
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{plain(folder)}: a file is there; choose another folder for the adapter")
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    metadata = {"format": "pt", BASE_KEY: base}
    write(folder / WEIGHTS_FILE, _sorted_header(save(tensors, metadata)))
    settings = config_to_peft(adapter_config(model, adapter), _members(model, adapter), base_model)
    write(folder / CONFIG_FILE, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return folder


def without_start(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter relative to the unchanged base: the start of PiSSA becomes additional rank, ``[A; A0] [B, -B0]``."""
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
    """PEFT needs to know whether the model can generate: a classifier or an encoder of transformers cannot."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    generates = hasattr(model, "prepare_inputs_for_generation") or not hasattr(model, "get_output_embeddings")
    projects = bool(output_projection_names(model)) or tied_embedding(model) is not None
    return projects and generates and not encodes


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

    If the model has no adapter of that name, one is applied as ``adapter_config.json`` says. An adapter of a different
    base (by its shapes, values or ``base_model`` name) is a ValueError unless ``check_base=False``.
    """
    folder, file = Path(path), Path(path) / WEIGHTS_FILE
    settings = read_adapter_config(folder)
    state, metadata = read_adapter_weights(folder)
    check_amount(model, state, file)
    if check_base:
        check_base_of(model, file, settings, metadata, base_model)
    check_finite(state, file)
    config = config_from_peft(settings, folder / CONFIG_FILE).with_(quantize_base=quantize_base)
    state, brought = take_embeddings(model, state, settings, file, check_base=check_base)
    config = as_here(model, config, folder)
    config = config.with_(modules_to_save=tuple(dict.fromkeys((*config.modules_to_save, *brought))))
    check_targets(model, config, state, folder)
    check_ranks(model, config, state, folder)
    fresh = adapter not in adapter_names(model)
    active, trained = active_adapters(model), [p for p in model.parameters() if p.requires_grad]
    if fresh:
        config = precise(model, config, state)
        apply_lora_(model, config, adapter=adapter)
    else:
        check_same(model, config, adapter, folder)
        if adapter_config(model, adapter).dtype is None:
            _widen_(model, state, adapter)
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
        raise ValueError(f"{plain(file)}: {error}") from None
    return config


def _widen_(model: nn.Module, state: dict[str, Tensor], adapter: str) -> None:
    """An adapter without a chosen dtype gets one for the exact values of the file."""
    for entry in entries(model, adapter):
        if entry.key in state:
            parameter, given = entry.parameter, state[entry.key].dtype
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, given))


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter folder."""
    folder, file = Path(folder), Path(folder) / CONFIG_FILE
    if not os.path.lexists(file):
        present = listed([p.name for p in folder.iterdir()], 8) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{plain(file)} not found: not an adapter folder (there is: {present or 'nothing'}); give the folder that "
            "save_adapter or PEFT wrote"
        )
    return read_json(file)


def _plain_key(key: str) -> str:
    """A key without PEFT's prefix, the names of wrappers, and the name of an adapter (in a raw dump)."""
    key = clean_name(key.removeprefix("module.")).removeprefix(_PREFIX)
    return _NAMED.sub(r"\1\2", key)


def read_adapter_weights(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter folder without the ``base_model.model.`` prefix, and the file's metadata."""
    file = Path(folder) / WEIGHTS_FILE
    if not os.path.lexists(file):
        pickled = os.path.lexists(Path(folder) / "adapter_model.bin")
        why = ": adapter_model.bin is a pickle, which can run code; save it again with safe_serialization=True"
        raise FileNotFoundError(f"{plain(file)} not found{why if pickled else '; save the adapter again'}")
    start, size = read_start(file), file.stat().st_size
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{" and HEADER_BYTES < length < size:
        expected = f"expected at most {HEADER_BYTES:,}; save the adapter again"
        raise ValueError(f"{plain(file)}: its header has {length:,} bytes, {expected}")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            check_names(keys, file)
            tensors = {_plain_key(key): opened.get_tensor(key) for key in keys}
            # no arithmetic with 8 bits of float; bf16 has all of their values
            tensors = {k: t.bfloat16() if t.is_floating_point() and t.itemsize == 1 else t for k, t in tensors.items()}
            return _saved_once(tensors), opened.metadata() or {}
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{plain(file)} is damaged or not a safetensors file ({size:,} bytes): {plain(error)}; download it again, "
            "or save the adapter again"
        ) from None


def check_names(keys: Sequence[str], file: Path) -> None:
    """ValueError unless names of tensors, which errors repeat, are short, printable and unique."""
    odd = next((key for key in keys if not key.isprintable() or not 0 < len(key) <= LONGEST_NAME), None)
    if odd is not None:
        raise ValueError(
            f"{plain(file)}: tensor {shown(odd)}: expected a name of 1 to {LONGEST_NAME} printable characters; save "
            "the adapter again"
        )
    first: dict[str, str] = {}
    for key in keys:
        if first.setdefault(_plain_key(key), key) != key:
            raise ValueError(
                f"{plain(file)}: tensors {first[_plain_key(key)]} and {key} are the same one, {_plain_key(key)}; save "
                "the adapter again"
            )


def _saved_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a resized vocabulary PEFT writes each saved module three times; the trained one counts, as in PEFT."""
    trained = {key: key.replace(".modules_to_save.", ".") for key in tensors if ".modules_to_save." in key}
    before = {key.replace(".modules_to_save.", ".original_module.") for key in trained}
    kept = {key: tensor for key, tensor in tensors.items() if key not in before and key not in trained}
    return kept | {name: tensors[key] for key, name in trained.items()}


def _sorted_header(content: bytes) -> bytes:
    """safetensors writes metadata in a random order; equal adapters should be equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
