"""The keys of a config that name files: which they are, and how their paths are read."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tt_ckpt.safe_names import from_home
from tt_train.config import KDConfig, PreferenceSection, RunConfig, named_sets

C = TypeVar("C", bound=RunConfig)


def at_home(config: C) -> C:
    """The config with ``~/`` at the start of a path as the home folder. A shell leaves it alone inside a word."""
    return replace(_with_paths(config, home, home), output_dir=home(config.output_dir))


def absolute(config: C) -> C:
    """The config with every local path absolute, so that its run directory works from any folder."""
    return _with_paths(config, _absolute, lambda folder: folder and str(Path(folder).resolve()))


def _with_paths(config: C, change: Callable[[Any], Any], folder: Callable[[Any], Any]) -> C:
    """``change`` for what is read, which may be a hub id or a registered name; ``folder`` for what a run may make."""
    if isinstance(config, KDConfig):
        config = replace(config, kd=replace(config.kd, teacher=change(config.kd.teacher)))
    model = replace(config.model, path=change(config.model.path), tokenizer=change(config.model.tokenizer))
    adapter = config.adapter and replace(config.adapter, path=change(config.adapter.path))
    rows = {key: change(getattr(config.data, key)) for key in ("train", "template")}
    rows["cache_dir"] = folder(config.data.cache_dir)
    sets = named_sets(config.data.eval)  # their names are not paths
    rows["eval"] = {name: change(each) for name, each in sets.items()} if sets else change(config.data.eval)
    loss = config.loss
    if isinstance(loss, PreferenceSection):
        loss = replace(loss, reference_cache=folder(loss.reference_cache))
    return replace(config, model=model, adapter=adapter, data=replace(config.data, **rows), loss=loss)


def home(path: Any) -> Any:
    """A path, a list of paths or the names of a mapping, with ``~/`` and ``~user/`` as a home folder.

    FileNotFoundError if there is no such user; a file or folder here whose name begins with ``~`` is itself.
    """
    return _each(path, lambda text: str(from_home(text)) if _is_at_home(text) else text)


def _is_at_home(text: str) -> bool:
    first, slash, _ = text.partition("/")
    return bool(slash) and first.startswith("~") and (first == "~" or not os.path.lexists(first))


def _absolute(path: Any) -> Any:
    """The same for paths and patterns that are there; hub ids and registered names stay."""
    return _each(
        path, lambda text: str(Path(text).resolve()) if text and (Path(text).exists() or _matches(text)) else text
    )


def _each(path: Any, change: Callable[[str], str]) -> Any:
    if isinstance(path, list):
        return [_each(item, change) for item in path]
    if isinstance(path, dict):
        return {_each(name, change): value for name, value in path.items()}
    return change(path) if isinstance(path, str) else path


def _matches(pattern: str) -> bool:
    """Whether a relative pattern such as ``data/*.jsonl`` finds files here."""
    path = Path(pattern)
    return any(mark in pattern for mark in "*?[") and not path.is_absolute() and any(Path().glob(pattern))
