"""A model directory: its config, the files that travel with the weights, and writing one whole or not at all."""

import errno
import filecmp
import fnmatch
import json
import os
import shutil
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tt_ckpt import commit
from tt_ckpt.files import copy, half_fetched, read_json
from tt_ckpt.hf.mismatch import SIZES, refuse_far
from tt_ckpt.hf.stored_tensors import INDEX_NAME, open_tensors
from tt_ckpt.model_path import resolve
from tt_ckpt.safe_names import check_basename
from tt_ckpt.safetensors_file import TensorSpec
from tt_ckpt.shown import format_size, listed, plain

COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "tekken.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHTS = (
    "model*.safetensors",
    INDEX_NAME,
    "consolidated[.-]*",
    "torchtune_model_*.pt",
    "pytorch_model*",
    "params.json",
)
CONFIG_BYTES = 4_000_000
_NO_CONFIG = "; download it, or give the directory of the model itself"
COMPANION_FOLDERS = ("additional_chat_templates",)
_ELSE = "choose another directory, or pass overwrite=True (tt convert --overwrite)"


def read_config(path: str | Path) -> dict[str, Any]:
    """``config.json`` of a model directory or hub id, as a dict.

    ValueError if it is damaged, or states a size far beyond those of published models that the weights do not have.
    """
    directory = resolve(path)
    file = directory / "config.json"
    if not os.path.lexists(file):
        present = listed(sorted(entry.name for entry in directory.iterdir()), 8) or "nothing"
        convert = f"; a Meta checkpoint: run tt convert {plain(directory)} DEST --to hf --allow-pickle"
        hint = convert if (directory / "params.json").exists() else ""
        if (gguf := next(directory.glob("*.gguf"), None)) is not None:
            hint = f"; a GGUF file: run tt convert {plain(gguf)} DEST"
        begun = half_fetched(file)
        raise FileNotFoundError(f"{file}: missing{begun}; the directory contains {present}{hint or _NO_CONFIG}")
    config = read_json(file, directory, limit=CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(config).__name__}; download it again")
    if any(type(value := config.get(key)) is int and value > far for key, (far, _, _) in SIZES.items()):
        try:
            shapes = {key: spec.shape for key, spec in open_tensors(directory).specs.items()}
        except (OSError, ValueError):  # there are no whole weights: loading them says more about it
            shapes = {}
        refuse_far(file, config, shapes)
    return config


# ---- writing -------------------------------------------------------------------------------------------------------


def write_config(path: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], source: Path | None) -> None:
    """Write the config with the dtype of most values; the bytes of the source's config if it says the same."""
    config = dict(config)
    counts: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:  # 8-bit floats are of quantized weights
            counts[spec.dtype] += spec.nbytes // spec.dtype.itemsize
    for key in ("dtype", "torch_dtype"):
        if key in config and counts:
            config[key] = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    original = source / "config.json" if source is not None else None
    if original is not None and original.exists() and read_json(original, limit=CONFIG_BYTES) == config:
        copy(original, path)
    else:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # with Infinity, if the source has it
        commit.write_bytes(path, text.encode())


def copy_companions(source: Path, destination: Path, *, leave: Container[str] = ()) -> None:
    """Copy tokenizer, template, generation and license files that ``destination`` lacks, except those in ``leave``."""
    for entry in sorted(source.iterdir()):
        if entry.name in leave or (destination / entry.name).exists():
            continue
        travels = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in COMPANIONS) and not entry.is_dir()
        if travels or entry.name in COMPANION_FOLDERS:
            copy(entry, destination / check_basename(entry.name, where=source), source)


def has_tokenizer(directory: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    return any((directory / name).is_file() for name in names)


@contextmanager
def new_directory(path: Path, nbytes: int, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write a model of ``nbytes`` into; it becomes ``path`` if the block ends without an error.

    FileExistsError if ``path`` has weights, or other files with names that are written, unless ``overwrite``. Into an
    existing directory the files are moved one by one, after its old weights are set aside. OSError if the disk is full.
    """
    old = check_destination(path, overwrite=overwrite)
    check_room(path, nbytes)
    tmp = commit.make_tmp(path / "model" if path.is_dir() else path)  # an existing directory may be another disk
    try:
        yield tmp
        commit.fsync_tree(tmp)
        if path.exists():
            if not overwrite:
                _refuse_other_files(tmp, path)
            _replace(tmp, path, old)
        else:
            tmp.rename(path)
        commit.fsync_dir(path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def check_destination(path: Path, *, overwrite: bool) -> list[Path]:
    """The weight files in ``path`` that would be replaced; FileExistsError unless they may be."""
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path}: a link to nothing is there; remove it or choose another directory")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file is there; choose another directory")
    if (path / "adapter_config.json").exists():
        reason = "contains an adapter, which transformers would apply to the model"
        raise FileExistsError(f"{path}: {reason}; choose another directory")
    found = sorted({file for pattern in WEIGHTS for file in path.glob(pattern) if not file.is_dir()})
    if found and not overwrite:
        raise FileExistsError(f"{path}: already contains {found[0].name}; {_ELSE}")
    return found


def check_room(path: Path, nbytes: int) -> None:
    """OSError unless the disk of ``path``, which need not exist yet, has room for ``nbytes``."""
    place = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        sizes = f"{format_size(free)} free, the model needs {format_size(nbytes)}"
        raise OSError(errno.ENOSPC, f"{sizes}; free some or choose another directory", str(path))


def _refuse_other_files(tmp: Path, path: Path) -> None:
    for file in sorted(tmp.rglob("*")):
        there = path / file.relative_to(tmp)
        same = there.is_dir() if file.is_dir() else there.is_file() and filecmp.cmp(file, there, shallow=False)
        if os.path.lexists(there) and not same:
            raise FileExistsError(f"{there}: another file is there already; {_ELSE}")


def _replace(tmp: Path, path: Path, old: list[Path]) -> None:
    """Set the old files aside and move the new ones in; the old ones come back if anything fails first, Ctrl-C too."""
    entries = sorted(tmp.iterdir(), key=lambda entry: (entry.name == INDEX_NAME, entry.name))
    for file in check_destination(path, overwrite=True):
        if file not in old:
            raise FileExistsError(f"{path}: {file.name} was written meanwhile by another process; nothing was changed")
    for entry in entries:
        if (path / entry.name).is_dir() and not entry.is_dir():
            raise FileExistsError(f"{path / entry.name}: a directory is there; remove it or choose another place")
    aside = commit.make_tmp(path / "model")
    replaced = [path / entry.name for entry in entries if (path / entry.name).exists()]
    moves = [(file, aside / file.name) for file in dict.fromkeys([*old, *replaced])]
    moves += [(entry, path / entry.name) for entry in entries]
    begun: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            begun.append((source, target))
            source.rename(target)
        commit.fsync_dir(path)
    except BaseException:
        for source, target in reversed(begun):
            if os.path.lexists(target) and not os.path.lexists(source):
                target.rename(source)
        raise
    finally:
        commit.remove_tree(aside)
