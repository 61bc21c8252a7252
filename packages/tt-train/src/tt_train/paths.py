"""Paths in a config as a shell would leave them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tt_train.config import RunConfig


def at_home(config: RunConfig) -> RunConfig:
    """The config with ``~/`` at the start of a path as the home folder: a shell leaves it alone inside a word."""
    model = replace(config.model, path=home(config.model.path), tokenizer=home(config.model.tokenizer))
    adapter = config.adapter and replace(config.adapter, path=home(config.adapter.path))
    rows = {key: home(getattr(config.data, key)) for key in ("train", "eval", "template", "cache_dir")}
    data = replace(config.data, **rows)
    return replace(config, model=model, adapter=adapter, data=data, output_dir=home(config.output_dir))


def home(path: Any) -> Any:
    """A path, a list of paths or the keys of a mapping, with ``~/`` as the home folder."""
    if isinstance(path, list):
        return [home(item) for item in path]
    if isinstance(path, dict):
        return {home(name): value for name, value in path.items()}
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~/") else path
