"""Hugging Face model directories: where they are, their config, and writing one that transformers loads."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tt_ckpt import commit
from tt_ckpt.names import safe_file
from tt_ckpt.shards import INDEX_NAME, Shards, encode_index, find_shards, read_json, same_layout, split
from tt_ckpt.slots import find_slots, meta
from tt_ckpt.slots import split as split_parameter
from tt_ckpt.tensor_file import TensorSpec, canonical_order, spec_of, write_tensors

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
COMPANION_FOLDERS = ("additional_chat_templates",)


def resolve(path: str | Path) -> Path:
    """The local directory of a model: ``path`` itself when it is one, else the hub snapshot of that repository."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        raise ValueError(f"{path}: a file; give the model directory that holds it")
    text = str(path)
    if isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise FileNotFoundError(f"{path}: no such directory{_similar(local)}")
    from tt_ckpt.hub import snapshot

    return snapshot(text)


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is {path.parent}; the working directory is {Path.cwd()})"
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, beside, 1, 0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else f" (the working directory is {Path.cwd()})"


def read_config(path: str | Path) -> dict[str, Any]:
    """``config.json`` of a model directory or hub id, as a dict."""
    directory = resolve(path)
    file = directory / "config.json"
    if not file.exists():
        present = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        hint = "; a Meta checkpoint: run tt convert" if (directory / "params.json").exists() else ""
        raise FileNotFoundError(f"{file}: missing; the directory holds {present}{hint}")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


# ---- writing -------------------------------------------------------------------------------------------------------


def save_hf(
    model: nn.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any],
    source: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``model``'s base weights as a Hugging Face directory: safetensors shards, index, ``config.json``.

    ``source``: a model directory (or hub id) whose tokenizer, template, generation and license files are copied, and
    whose shards and header order are kept when the tensors' names, shapes and dtypes are the same: an unchanged model
    is written byte for byte. ``dtype`` casts floating weights. Adapter parameters are not written: merge first.

    The directory appears whole or not at all. One that holds weights already is a FileExistsError unless ``overwrite``.
    """
    pieces = _pieces(model, dtype)
    specs = {key: spec for key, (spec, _) in pieces.items()}
    write_model(
        Path(path),
        specs,
        lambda key: pieces[key][1](),
        config=config,
        source=None if source is None else resolve(source),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def _pieces(model: nn.Module, dtype: torch.dtype | None) -> dict[str, tuple[TensorSpec, Callable[[], Tensor]]]:
    """File key -> what it will be, and how to make it when its turn comes."""
    found: dict[str, tuple[TensorSpec, Callable[[], Tensor]]] = {}
    for slot in find_slots(model):
        tensor, name = slot.tensor, slot.name
        if tensor.device.type == "meta":
            raise ValueError(f"parameter {name} is on the meta device: load weights before saving")
        if type(tensor.data) is not Tensor:
            raise ValueError(f"parameter {name} is a {type(tensor.data).__name__}: merge or dequantize before saving")
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for key, piece in split_parameter(model, name, meta(spec_of(tensor))).items():

            def make(key: str = key, name: str = name, tensor: Tensor = tensor, kind: torch.dtype = kind) -> Tensor:
                return split_parameter(model, name, tensor.detach())[key].to(kind)

            found[key] = (TensorSpec(dtype=kind, shape=tuple(piece.shape)), make)
    return found


def write_model(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    *,
    config: Mapping[str, Any],
    source: Path | None,
    max_shard_size: str | int,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write tensors given by name as a model directory; see ``save_hf``."""
    old = _old_weights(path)
    if old and not overwrite:
        raise FileExistsError(f"{path}: holds {old[0].name} already; choose another directory or allow overwriting")
    layout = _layout_of(source)
    tmp = commit.make_tmp(path)
    try:
        _write_shards(tmp, specs, get, layout, max_shard_size, progress)
        _write_config(tmp / "config.json", config, specs, source)
        if source is not None:
            copy_companions(source, tmp)
        _publish(tmp, path, old)
    finally:
        commit.remove_tree(tmp)


def _layout_of(source: Path | None) -> Shards | None:
    """The shards of the source, when it has some that can be read."""
    if source is None:
        return None
    try:
        return find_shards(source)
    except (FileNotFoundError, ValueError):
        return None  # a tokenizer-only directory, or a pickled original: nothing to keep


def _write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    layout: Shards | None,
    max_shard_size: str | int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(spec.nbytes for spec in specs.values()), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    if layout is not None and same_layout(layout, specs, max_shard_size):
        for name, header in layout.files.items():
            write_tensors(folder / name, header.tensors, get, metadata=header.metadata, progress=advance)
        if layout.index is not None:
            commit.copy_file(layout.directory / INDEX_NAME, folder / INDEX_NAME)
        return
    files = split(specs, max_shard_size)
    for name, keys in files.items():
        held = {key: specs[key] for key in keys}
        ordered = {key: held[key] for key in canonical_order(held)}
        write_tensors(folder / name, ordered, get, metadata={"format": "pt"}, progress=advance)
    if len(files) > 1:
        commit.write_bytes(folder / INDEX_NAME, encode_index(files, specs).encode())


def _write_config(path: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], source: Path | None) -> None:
    """The config with the dtype that the weights have; the source's own bytes when it says the same."""
    config = dict(config)
    dtypes = {spec.dtype for spec in specs.values() if spec.dtype.is_floating_point}
    for key in ("dtype", "torch_dtype"):
        if key in config and len(dtypes) == 1:
            config[key] = str(next(iter(dtypes))).removeprefix("torch.")
    original = source / "config.json" if source is not None else None
    if original is not None and original.exists() and read_json(original) == config:
        commit.copy_file(original, path)
    else:
        commit.write_json(path, config)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy tokenizer, template, generation and license files."""
    for entry in sorted(source.iterdir()):
        if entry.is_file() and any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in COMPANIONS):
            commit.copy_file(safe_file(source, entry.name), destination / entry.name)
        elif entry.is_dir() and entry.name in COMPANION_FOLDERS:
            (destination / entry.name).mkdir(mode=0o755)
            for file in sorted(entry.iterdir()):
                if file.is_file():
                    commit.copy_file(safe_file(entry, file.name), destination / entry.name / file.name)


def _old_weights(path: Path) -> list[Path]:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file stands there; choose another directory")
    names = ("model*.safetensors", INDEX_NAME)
    return sorted(file for pattern in names for file in path.glob(pattern)) if path.exists() else []


def _publish(tmp: Path, path: Path, old: list[Path]) -> None:
    """Rename the finished folder into place; into an existing folder, file by file, after its old weights are gone."""
    commit.fsync_tree(tmp)
    if not path.exists():
        tmp.rename(path)
    else:
        for file in old:
            file.unlink()
        for entry in sorted(tmp.iterdir(), key=lambda entry: (entry.name == INDEX_NAME, entry.name)):
            target = path / entry.name
            if entry.is_dir() and target.is_dir():
                commit.remove_tree(target)
            entry.replace(target)
        commit.fsync_dir(path)
    commit.fsync_dir(path.parent)
