"""A model to convert: which format a directory has, and its tensors under Hugging Face names."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tt_ckpt.files import DOWNLOAD, inside, read_json
from tt_ckpt.formats.dcp import METADATA_NAME, DistributedFolder
from tt_ckpt.formats.meta import from_meta
from tt_ckpt.formats.pickles import MappedTensors, read_pickled
from tt_ckpt.formats.torchtune import from_torchtune
from tt_ckpt.formats.translation import pieces_of, specs_of
from tt_ckpt.hf.directory import CONFIG_BYTES, read_config
from tt_ckpt.hf.mismatch import WRAPPERS, describe_tie
from tt_ckpt.hf.save import stored_weights
from tt_ckpt.hf.stored_tensors import INDEX_NAME, SINGLE_NAME, StoredTensors, describe_no_weights, shard_names
from tt_ckpt.hf.weights import EMBEDDING, OUTPUT, Weights, same_bytes
from tt_ckpt.safe_names import safe_file
from tt_ckpt.safetensors_file import read_header
from tt_ckpt.shown import listed, plain, quoted

MISTRAL_NAME = "consolidated.safetensors"
_MISTRAL_SHARD = re.compile(r"consolidated-\d{5}-of-(\d{5})\.safetensors")
PICKLE_INDEX = "pytorch_model.bin.index.json"
# tried in this order; the number in (..) is the epoch, and the last epoch is used
_PICKLE_SETS = (
    r"consolidated\.\d\d\.pth",
    r"pytorch_model\.bin",
    r"torchtune_model_(\d+)\.pt",
    r"meta_model_(\d+)\.pt",
    r"hf_model_\d{4}_(\d+)\.pt",
    r"(?:ft-)?model-\d{5}-of-\d{5}\.bin",
    r"[^.].*\.(?:pth|pt|bin)",
)
_NOT_MODELS = re.compile(r"(adapter|recipe_state|optimizer|scheduler|training_args|rng_state).*")


def open_model(directory: Path, *, allow_pickle: bool = False, config: Path | None = None) -> Weights:
    """The weights of ``directory``, whatever their format, under Hugging Face names.

    ``config``: a directory with config.json or params.json, if the directory of the weights has none.
    """
    folder = _newest_epoch(directory)
    known = _read_settings([folder, directory] if config is None else [config, folder])
    return without_copies(_open(folder, known, allow_pickle))


def _open(folder: Path, known: Mapping[str, dict[str, Any]], allow_pickle: bool) -> Weights:
    if os.path.lexists(folder / INDEX_NAME) or os.path.lexists(folder / SINGLE_NAME):
        return stored_weights(folder, known.get("config.json", {}))
    if names := _mistral_files(folder):
        headers = {name: read_header(safe_file(folder, name)) for name in names}
        counts = Counter(name for header in headers.values() for name in header.tensors)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"{folder}: tensor {quoted(twice[0])} is in two of {listed(names)}; download them again")
        where = {name: file for file, header in headers.items() for name in header.tensors}
        return _by_names([StoredTensors(folder, headers, where, has_index=False)], known, [headers[names[0]].path])
    if (folder / METADATA_NAME).exists():
        if not allow_pickle:
            raise ValueError(f"{folder / METADATA_NAME}: a pickle; if you trust it: --allow-pickle")
        return _by_names([_model_of(DistributedFolder(folder))], known, [folder / METADATA_NAME])
    files = _pickle_files(folder)
    parts = [read_pickled(safe_file(folder, name), allow_pickle=allow_pickle) for name in files]
    return _by_names(parts, known, [folder / name for name in files])


def _mistral_files(folder: Path) -> list[str]:
    """The files of Mistral's own releases: one file, or all of a numbered set."""
    if os.path.lexists(folder / MISTRAL_NAME):
        return [MISTRAL_NAME]
    names = {path.name for path in folder.iterdir()}
    count = max((int(match[1]) for name in names if (match := _MISTRAL_SHARD.fullmatch(name))), default=0)
    expected = [f"consolidated-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if missing := [name for name in expected if name not in names]:
        raise FileNotFoundError(f"{folder}: {len(missing)} of {count} files missing: {listed(missing)}; download them")
    return expected


def _newest_epoch(directory: Path) -> Path:
    """``directory``, or its newest ``epoch_N``, into which torchtune 0.5 and later put a model."""
    entries = list(directory.iterdir())
    epochs = [(int(match[1]), one) for one in entries if (match := re.fullmatch(r"epoch_(\d+)", one.name))]
    has_weights = any(entry.suffix in (".safetensors", ".bin", ".pt", ".pth") for entry in entries)
    if not epochs or has_weights:
        return directory
    newest = max(epochs)[1]
    inside(newest, directory)
    return newest


def epochs_in(directory: Path) -> list[int]:
    """The epochs of which torchtune left a model in ``directory``; open_model reads the newest."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    if _newest_epoch(directory) != directory:
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"epoch_(\d+)", name)))
    if any(name in names for name in (INDEX_NAME, SINGLE_NAME, PICKLE_INDEX, "pytorch_model.bin")):
        return []
    numbered = r"(?:torchtune_model|meta_model|hf_model_\d{4})_(\d+)\.pt"
    return sorted({int(match[1]) for name in names if (match := re.fullmatch(numbered, name))})


def _read_settings(folders: list[Path]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if os.path.lexists(folder / "config.json"):
            found.setdefault("config.json", read_config(folder))
        if os.path.lexists(folder / "params.json"):
            params = read_json(safe_file(folder, "params.json"), limit=CONFIG_BYTES)
            if not isinstance(params, dict):
                found_type = type(params).__name__
                raise ValueError(f"{folder / 'params.json'}: expected a JSON object, found {found_type}; {DOWNLOAD}")
            found.setdefault("params.json", params)
    return found


def _pickle_files(folder: Path) -> list[str]:
    """The pickled files that make up one model."""
    if os.path.lexists(folder / PICKLE_INDEX):
        names = shard_names(folder / PICKLE_INDEX, read_json(folder / PICKLE_INDEX), ".bin")
        missing = [name for name in names if not safe_file(folder, name).exists()]
        if missing:
            what = f"{len(missing)} of {len(names)} files missing: {listed(missing)}"
            raise FileNotFoundError(f"{folder}: {what}; download them")
        return names
    present = sorted(entry.name for entry in folder.iterdir() if not _NOT_MODELS.fullmatch(entry.name))
    for pattern in _PICKLE_SETS:
        matches = [match for name in present if (match := re.fullmatch(pattern, name))]
        if matches and re.compile(pattern).groups:
            last = max(int(match[1]) for match in matches)
            matches = [match for match in matches if int(match[1]) == last]
        if matches:
            return [match.string for match in matches]
    raise FileNotFoundError(describe_no_weights(folder))


def _model_of(found: DistributedFolder) -> Mapping[str, Tensor]:
    """The model in a training state: the tensors under ``model.``, if there are any."""
    nested = any(name in found for name in ("model.model.embed_tokens.weight", "model.tok_embeddings.weight"))
    return found.below("model.") if nested else found


def _by_names(parts: Sequence[Mapping[str, Tensor]], known: Mapping[str, dict[str, Any]], files: list[Path]) -> Weights:
    """The weights in the format that the names of the tensors show."""
    config = known.get("config.json")
    keys = parts[0].keys()
    if any(".attention.wq." in key for key in keys):
        return from_meta(parts, params=known.get("params.json"), config=config, files=files)
    if len(parts) == 1:
        return _by_keys(parts[0], config, files)
    together: dict[str, Tensor] = {}
    swapped: set[str] = set()
    for file, part in zip(files, parts, strict=True):
        twice = sorted(together.keys() & part.keys())
        if twice:
            raise ValueError(f"{file}: {plain(twice[0])} is in another file too; keep one model in {file.parent}")
        assert isinstance(part, MappedTensors)  # nothing else is in several files here
        together |= part
        swapped |= part.swapped
    return _by_keys(MappedTensors(together, swapped), config, files)


def _by_keys(tensors: Mapping[str, Tensor], config: dict[str, Any] | None, files: list[Path]) -> Weights:
    keys = tensors.keys()
    if any(".attn.q_proj." in key or ".sa_norm." in key for key in keys):
        if config is None:
            raise ValueError(f"{files[0].parent}: no config.json, which states the number of heads; give config=DIR")
        return from_torchtune(tensors, config=config, files=files)
    if any("embed_tokens" in key or ".self_attn." in key for key in keys):
        specs = specs_of(tensors)
        return Weights(
            specs=specs, get=tensors.__getitem__, pieces=partial(pieces_of, tensors), config=dict(config or {}),
            format="hf", files=tuple(files),
        )  # fmt: skip
    shown = listed(sorted(keys)) or "none"
    known = "known: Hugging Face, Meta, torchtune"
    raise ValueError(f"{files[0]}: tensors of no format known here ({shown}); {known}; give the files of one model")


def without_copies(weights: Weights) -> Weights:
    """The weights without what the config makes redundant, and without the prefix of a wrapper in the names.

    Left out are the output of a tied model, which must equal the embedding, and the rotary frequencies of old files.
    """
    weights = _unwrapped(weights)
    specs = {name: spec for name, spec in weights.specs.items() if not name.endswith("rotary_emb.inv_freq")}
    tied = weights.config.get("tie_word_embeddings", weights.family.startswith("gemma"))  # as transformers defaults it
    if tied and OUTPUT in specs and EMBEDDING in specs:
        shapes = weights.specs[EMBEDDING].shape, weights.specs[OUTPUT].shape
        pairs = zip(weights.pieces(OUTPUT), weights.pieces(EMBEDDING), strict=False)
        if shapes[0] != shapes[1] or not all(same_bytes(ours, theirs) for ours, theirs in pairs):
            raise ValueError(describe_tie(weights.files[0].parent, EMBEDDING, OUTPUT, shapes))
        del specs[OUTPUT]
    return replace(weights, specs=specs)


def _unwrapped(weights: Weights) -> Weights:
    names = {name: name for name in weights.specs}
    while names and (prefix := next((one for one in WRAPPERS if all(name.startswith(one) for name in names)), "")):
        names = {name.removeprefix(prefix): key for name, key in names.items()}
    if odd := next((name for name in names if ".lora_" in name or ".base_layer." in name), ""):
        what = "belongs to an adapter that was saved with its base; merge it first"
        raise ValueError(f"{weights.files[0]}: {plain(odd)} {what}")
    specs = {name: weights.specs[key] for name, key in names.items()}
    return replace(
        weights,
        specs=specs,
        get=lambda name: weights.get(names[name]),
        pieces=lambda name: weights.pieces(names[name]),
    )
