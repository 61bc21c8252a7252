"""How the tensors of a Hugging Face directory lie in its files: kept where it fits, remembered, or made anew."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tt_ckpt import commit
from tt_ckpt.files import read_json, read_text
from tt_ckpt.hf.shards import INDEX_NAME, encode_index, find_shards, parse_size, split
from tt_ckpt.safe_names import check_basename
from tt_ckpt.safetensors_file import TensorSpec, canonical_order

LAYOUT_NAME = "hf_layout.json"  # in directories of other formats: how the Hugging Face files lay, to write them again


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How tensors lie in files: names of files, keys in the order of their bytes, metadata, the text of the index."""

    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str] | None]
    index: str | None

    def fits(self, specs: Mapping[str, TensorSpec], max_shard_size: str | int) -> bool:
        """Whether exactly these tensors can lie so, within the limit."""
        keys = [key for held in self.files.values() for key in held]
        limit = parse_size(max_shard_size)
        return sorted(keys) == sorted(specs) and all(
            len(held) <= 1 or sum(specs[key].nbytes for key in held) <= limit for held in self.files.values()
        )


def read_layout(directory: Path) -> Layout | None:
    """The layout of a Hugging Face directory, or the one remembered in a converted one; None where neither is sound."""
    try:
        if os.path.lexists(directory / LAYOUT_NAME):
            return _parse_layout(directory / LAYOUT_NAME)
        shards = find_shards(directory)
    except (FileNotFoundError, ValueError):
        return None
    if shards.index is None and len(shards.files) > 1:
        return None  # an index is to be made
    return Layout(
        files={name: list(header.tensors) for name, header in shards.files.items()},
        metadata={name: header.metadata for name, header in shards.files.items()},
        index=read_text(directory / INDEX_NAME) if shards.index is not None else None,
    )


def _parse_layout(path: Path) -> Layout:
    value = read_json(path)
    try:
        files = {check_basename(name, where=path): [str(key) for key in keys] for name, keys in value["files"].items()}
        metadata = {name: value["metadata"][name] for name in files}
        sound = all(name.endswith(".safetensors") for name in files) and isinstance(value["index"], str | None)
        sound = sound and all(entry is None or _is_text(entry) for entry in metadata.values())
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged; remove it")
    return Layout(files=files, metadata=metadata, index=value["index"])


def _is_text(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())


def write_layout(layout: Layout, folder: Path) -> None:
    """Remember a layout beside another format. Not JSON by sorted keys: the order of keys is what is kept."""
    value = {"files": layout.files, "metadata": layout.metadata, "index": layout.index}
    commit.write_bytes(folder / LAYOUT_NAME, json.dumps(value).encode())


def choose_layout(kept: Layout | None, specs: Mapping[str, TensorSpec], max_shard_size: str | int) -> Layout:
    """``kept`` where it fits, else split anew as huggingface_hub does."""
    if kept is not None and kept.fits(specs, max_shard_size):
        return kept
    files = split(specs, max_shard_size)
    return Layout(
        files={name: canonical_order({key: specs[key] for key in keys}) for name, keys in files.items()},
        metadata={name: {"format": "pt"} for name in files},
        index=encode_index(files, specs) if len(files) > 1 else None,
    )
