"""Your own recipe file. It runs only if its path was typed, and a run keeps a copy of the file that made it."""

import dataclasses
import hashlib
import importlib.abc
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tt_ckpt.redaction import redact
from tt_train.config import RunConfig, SFTConfig
from tt_train.errors import ConfigError, did_you_mean, shell_word
from tt_train.settings.keys.text import read_text
from tt_train.settings.registry import finding_modules_here


@dataclasses.dataclass(frozen=True)
class RecipeFile:
    """The text that was run as ``module``, and what it was called."""

    name: str
    text: str
    module: ModuleType

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


_LOADED: dict[str, RecipeFile] = {}  # by hash: what this process was asked to run


def load_recipe_file(path: Path, allow_import: Sequence[str] = ()) -> RecipeFile:
    """Run a recipe file and return it; ConfigError names the line where it fails, and what it lacks.

    Its folder is on no path: it stands alone, imports what is installed, or modules of ``allow_import``.
    """
    if not os.path.lexists(path):
        near = did_you_mean(str(path), [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else [])
        cure = near or f"; tt cp sft {shell_word(path)} makes one"
        raise ConfigError([f"{path}: no such recipe file (looked in {Path.cwd()}){cure}"])
    text = read_text(path, "recipe file")
    if redact(text) != text:
        raise ConfigError([f"{path}: contains a secret, and a run keeps a copy of its recipe; read it from os.environ"])
    name = f"tt_recipe_{path.stem}"
    spec = importlib.util.spec_from_loader(name, _TextLoader(text, path), origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and annotations look their module up
    with finding_modules_here(allow_import):
        _execute(module, path)
    recipe = RecipeFile(path.name, text, module)
    if not callable(getattr(module, "main", None)):
        raise ConfigError(
            [f"{path}: has no function main(config, *, console, resume, dry_run); compare with: tt cp sft"]
        )
    schema_of(recipe)
    _LOADED[recipe.sha256] = recipe
    return recipe


class _TextLoader(importlib.abc.InspectLoader):
    """Runs a text that was read before: what is hashed and copied is what ran, and no cache is written beside it."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path = text, path

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text, str(self.path))


def _execute(module: ModuleType, path: Path) -> None:
    loader = module.__loader__
    assert isinstance(loader, _TextLoader)
    try:
        loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError([f"{path}:{error.lineno}: not Python: {error.msg}; correct this line"]) from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        cure = "; correct the recipe (-v shows the traceback)"
        if isinstance(error, ModuleNotFoundError):
            cure = _how_to_import(str(error.name).partition(".")[0], path.parent)
        where = f":{lines[-1]}" if lines else ""
        raise ConfigError([f"{path}{where}: {type(error).__name__}: {error}{cure}"]) from error


def _how_to_import(name: str, folder: Path) -> str:
    if _holds(Path(), name):
        return f"; to let it be imported from the working folder, add --allow-import {name}"
    if _holds(folder, name):
        return f"; it is in {folder}, not in the working folder: cd {folder}, and add --allow-import {name}"
    return "; install it: a recipe file imports what is installed, and what --allow-import names in the working folder"


def _holds(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


def schema_of(recipe: RecipeFile) -> type[RunConfig]:
    """The dataclass of its keys: ``Config``, which extends RunConfig; SFTConfig if it has none."""
    schema = getattr(recipe.module, "Config", SFTConfig)
    if not (isinstance(schema, type) and issubclass(schema, RunConfig)):
        raise ConfigError([f"{recipe.name}: Config must extend tt_train.RunConfig, as in: class Config(RunConfig)"])
    undeclared = set(vars(schema).get("__annotations__", {})) - {field.name for field in dataclasses.fields(schema)}
    if undeclared:
        raise ConfigError([f"{recipe.name}: Config is not a dataclass; write @dataclass above class Config(RunConfig)"])
    return schema


def recipe_of(config: RunConfig) -> Any:
    """The module whose ``main`` takes ``config``."""
    if config.recipe_sha256 is not None:
        return _LOADED[config.recipe_sha256].module
    return importlib.import_module(f"tt_train.recipes.{config.recipe}")


def copy_of(config: RunConfig) -> RecipeFile | None:
    """What a run keeps beside its config; None for a recipe that comes with the package."""
    return _LOADED.get(config.recipe_sha256 or "")


def repeating(run: Path, manifest: Mapping[str, Any]) -> str:
    """What a user types to run the config of a run directory again: its recipe file and what it may import included."""
    config, name = shell_word(run / "config.yaml"), str(manifest.get("recipe"))
    recipe = f"{shell_word(run / Path(name).name)} --config {config}" if name.endswith(".py") else config
    allowed = [f" --allow-import {shell_word(module)}" for module in sorted(manifest.get("imports") or {})]
    return f"tt run {recipe}{''.join(allowed)}"


def check_recipe(said: str, sha256: str | None, where: str, file: Path | None, typed: str | RecipeFile | None) -> None:
    """ConfigError if a config for the recipe file ``said`` is run by another recipe, by a changed one, or by itself.

    Args:
        where: where the config says so. file: the config's own. typed: the recipe of the command line, if any.
    """
    name = Path(said).name
    beside = file.parent / name if file is not None else Path(name)
    command = f"tt run {shell_word(beside if beside.is_file() else name)}"
    command += f" --config {shell_word(file)}" if file is not None else ""
    mark = f" (sha256 {sha256[:12]})" if sha256 else ""
    if isinstance(typed, RecipeFile) and typed.name == name:
        if sha256 not in (None, typed.sha256):
            raise ConfigError(
                [
                    f"{where}: recipe: {name} is not the file that this config was run with{mark}, it has sha256 "
                    f"{typed.sha256[:12]}; repeat the run with {command}, or run it as it is with recipe_sha256=null"
                ]
            )
        return
    if typed is not None:
        other = typed.name if isinstance(typed, RecipeFile) else typed
        raise ConfigError(
            [f"{where}: recipe: this config is for {name}{mark}, not for {other}; {command}, or add recipe={other}"]
        )
    raise ConfigError([f"{where}: recipe: {name}{mark} is a recipe file, which runs only if you name it: {command}"])
