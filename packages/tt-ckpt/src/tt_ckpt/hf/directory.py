"""A model directory: where it is, its config, the files that travel with the weights, and its appearance as a whole."""

import difflib
import errno
import filecmp
import fnmatch
import json
import os
import shutil
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from tt_ckpt import commit
from tt_ckpt.files import copy, read_json
from tt_ckpt.hf.shards import INDEX_NAME, find_shards
from tt_ckpt.hf.sizes import is_far, refuse_far
from tt_ckpt.placeholder import half_fetched
from tt_ckpt.safe_names import check_basename, safe_file
from tt_ckpt.safetensors_file import TensorSpec
from tt_ckpt.shown import format_size, listed, plain, quoted

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
WEIGHTS = (
    "model*.safetensors",
    INDEX_NAME,
    "consolidated[.-]*",
    "torchtune_model_*.pt",
    "pytorch_model*",
    "params.json",
    "hf_layout.json",
)
CONFIG_BYTES = 4_000_000
_LONGEST = 4096  # of a path
_NO_CONFIG = "; download it, or give the directory of the model itself"
COMPANION_FOLDERS = ("additional_chat_templates",)
_ELSE = "choose another directory, or pass overwrite=True (tt convert --overwrite)"


def resolve(path: str | Path) -> Path:
    """The local directory of a model: ``path`` itself when it is one, else the hub snapshot of that repository."""
    if len(str(path)) > _LONGEST:
        raise ValueError(f"{quoted(str(path))}: no directory has so long a name; give a model directory or hub id")
    local, shown = Path(path).expanduser(), plain(Path(path))
    if local.is_dir():
        return local
    if local.is_file():
        cure = "give the model directory that holds it"
        if local.suffix == ".gguf":
            cure = f"a Hugging Face directory is needed; run: tt convert {shown} DIR"
        raise ValueError(f"{shown}: a file; {cure}")
    if local.exists():
        raise ValueError(f"{shown}: neither a directory nor a regular file; give a model directory")
    text = str(path)
    kind = "file" if local.suffix == ".gguf" else "directory"
    if (
        isinstance(path, Path)
        or kind == "file"
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or "\\" in text
    ):
        raise FileNotFoundError(f"{shown}: no such {kind}{_similar(local)}")
    close = _similar(local)
    if "/" not in text and "did you mean" in close:  # a word beside a folder of nearly that name is a typo, no hub id
        raise FileNotFoundError(f"{shown}: no such directory{close}")
    from tt_ckpt.hub.download import snapshot

    try:
        return snapshot(text)
    except (FileNotFoundError, ConnectionError) as error:
        if "did you mean" not in close:
            raise
        raise type(error)(f"{error}{close}") from None  # runs/frist looks like a repository


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is {plain(path.parent)}; the working directory is {Path.cwd()})"
    is_file = path.suffix == ".gguf"
    beside = [entry.name for entry in path.parent.iterdir()
              if (entry.is_file() and entry.suffix == ".gguf") or (entry.is_dir() and not is_file)]  # fmt: skip
    close = difflib.get_close_matches(path.name, beside, 1, 0.5)
    return f"; did you mean {plain(path.parent / close[0])}?" if close else f" (the working directory is {Path.cwd()})"


def read_config(path: str | Path) -> dict[str, Any]:
    """``config.json`` of a model directory or hub id, as a dict.

    ValueError if it is damaged, or states a size far beyond those of published models that the weights do not have.
    """
    directory = resolve(path)
    file = safe_file(directory, "config.json")
    if not file.exists():
        present = listed(sorted(entry.name for entry in directory.iterdir()), 8) or "nothing"
        hint = "; a Meta checkpoint: run tt convert" if (directory / "params.json").exists() else ""
        if (gguf := next(directory.glob("*.gguf"), None)) is not None:
            hint = f"; a GGUF file: run tt convert {plain(gguf)} DEST"
        begun = half_fetched(file)
        raise FileNotFoundError(f"{file}: missing{begun}; the directory holds {present}{hint or _NO_CONFIG}")
    config = read_json(file, directory, limit=CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(config).__name__}; download it again")
    if is_far(config):
        refuse_far(file, config, _shapes(directory))
    return config


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Those of the weights; none if there are no whole weights, of which the loader has more to say."""
    try:
        shards = find_shards(directory)
    except (OSError, ValueError):
        return {}
    return {key: shards.spec(key).shape for key in shards.where}


# ---- writing -------------------------------------------------------------------------------------------------------


def write_config(path: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], source: Path | None) -> None:
    """The config with the dtype that most values have; the source's own bytes when it says the same."""
    config = dict(config)
    counts: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        if spec.dtype.is_floating_point:
            counts[spec.dtype] += spec.numel
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
    """Copy tokenizer, template, generation and license files that are not there yet, but for the names of ``leave``."""
    for entry in sorted(source.iterdir()):
        if entry.name in leave or (destination / entry.name).exists():
            continue
        travels = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in COMPANIONS) and not entry.is_dir()
        if travels or entry.name in COMPANION_FOLDERS:
            copy(entry, destination / check_basename(entry.name, where=source), source)


def put_file(place: Path, content: str | Path | None) -> None:
    """Write a text, or copy a file or the files of a folder, to a path that does not exist yet; None writes nothing."""
    if isinstance(content, str):
        commit.write_bytes(place, content.encode())
    elif content is not None:
        copy(content, place)


def has_tokenizer(directory: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    return any((directory / name).is_file() for name in names)


def check_destination(path: Path, *, overwrite: bool) -> list[Path]:
    """The weight files that stand in ``path`` and are to go; a FileExistsError unless they may."""
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path}: a link to nothing stands there; remove it or choose another directory")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file stands there; choose another directory")
    if (path / "adapter_config.json").exists():
        raise FileExistsError(
            f"{path}: holds an adapter, which transformers would put on top; choose another directory"
        )
    found = _weights_in(path)
    if found and not overwrite:
        raise FileExistsError(f"{path}: holds {found[0].name} already; {_ELSE}")
    return found


def check_room(path: Path, nbytes: int) -> None:
    """OSError unless the disk of ``path``, which need not be there yet, has room for ``nbytes``."""
    place = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        sizes = f"{format_size(free)} free, the model needs {format_size(nbytes)}"
        raise OSError(errno.ENOSPC, f"{sizes}; free some or choose another directory", str(path))


def _weights_in(path: Path) -> list[Path]:
    return sorted({file for pattern in WEIGHTS for file in path.glob(pattern) if not file.is_dir()})


def make_tmp(path: Path) -> Path:
    """An empty folder to prepare ``path`` in: inside of one that is there, which may be a disk of its own."""
    return commit.make_tmp(path / "model" if path.is_dir() else path)


def publish(tmp: Path, path: Path, old: list[Path], *, overwrite: bool) -> None:
    """Rename the finished folder into place; into an existing folder, file by file, after its old weights are gone.

    Another file of a name that is written is a FileExistsError unless ``overwrite``: a tokenizer or a license there.
    """
    if not overwrite:
        _refuse_other_files(tmp, path)
    commit.fsync_tree(tmp)
    if not path.exists():
        tmp.rename(path)
    else:
        _replace(tmp, path, old)
    commit.fsync_dir(path.parent)


def _refuse_other_files(tmp: Path, path: Path) -> None:
    for file in sorted(tmp.rglob("*")):
        there = path / file.relative_to(tmp)
        same = there.is_dir() if file.is_dir() else there.is_file() and filecmp.cmp(file, there, shallow=False)
        if os.path.lexists(there) and not same:
            raise FileExistsError(f"{there}: another file is there already; {_ELSE}")


def _replace(tmp: Path, path: Path, old: list[Path]) -> None:
    """The old files step aside, and come back when anything fails (Ctrl-C too) before the new ones are there."""
    entries = sorted(tmp.iterdir(), key=lambda entry: (entry.name == INDEX_NAME, entry.name))
    for file in _weights_in(path):
        if file not in old:
            raise FileExistsError(f"{path}: {file.name} has come meanwhile, from another process; nothing was written")
    for entry in entries:
        if (path / entry.name).is_dir() and not entry.is_dir():
            raise FileExistsError(f"{path / entry.name}: a directory stands there; remove it or choose another place")
    aside = make_tmp(path)
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
