"""Names that a config or a command may use, and what they stand for. Importing this loads no torch, no recipe."""

import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tt_train.config import logger_options
from tt_train.errors import ConfigError, did_you_mean, shell_word
from tt_train.losses.table import LOSSES, PREFERENCE_LOSSES
from tt_train.settings.keys.logger_table import LOGGERS, option_mistakes
from tt_train.settings.torchtune import names as torchtune

if TYPE_CHECKING:
    from tt_train.config import LossSection, RunConfig

HERE = Path(__file__).parents[1]

# what a user may type -> our recipe; torchtune 0.1.0's names come after ours
RECIPES = {
    "sft": "sft",
    "dpo": "dpo",
    "kd": "kd",
    "qat": "qat",
    **{theirs: ours for theirs, ours in torchtune.RECIPES.items() if ours is not None},
}
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "adam": "torch.optim.Adam", "sgd": "torch.optim.SGD",
              "adagrad": "torch.optim.Adagrad", "rmsprop": "torch.optim.RMSprop", "muon": "torch.optim.Muon",
              "adamw8bit": "torchao.optim.AdamW8bit", "adamw4bit": "torchao.optim.AdamW4bit",
              "adamw_fp8": "torchao.optim.AdamWFp8"}  # fmt: skip
# what other tools call these optimizers
_ELSEWHERE = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "fused_adamw": "adamw",
              "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit", "adamw_torch_8bit": "adamw8bit",
              "adamw_4bit": "adamw4bit", "adamw_torch_4bit": "adamw4bit", "ao_adamw_4bit": "adamw4bit",
              "ao_adamw_8bit": "adamw8bit", "ao_adamw_fp8": "adamw_fp8"}  # fmt: skip


def recipe_names() -> list[str]:
    """Our recipes, each once."""
    return sorted(set(RECIPES.values()))


def recipe_path(name: str) -> Path:
    """The file of a recipe, to read or to copy."""
    if name in torchtune.ELSEWHERE:
        raise ConfigError([f"{name}: {torchtune.ELSEWHERE[name]}"])
    if name not in RECIPES:
        raise ConfigError([f"{name}: unknown recipe{did_you_mean(name, RECIPES)}; known: {', '.join(recipe_names())}"])
    return HERE / "recipes" / f"{RECIPES[name]}.py"


def config_names() -> list[str]:
    """The configs that come with the package, such as ``llama/tiny_lora``; torchtune's are ``torchtune.PAIRS``."""
    return list(_config_names())


@functools.cache
def _config_names() -> tuple[str, ...]:
    folder = HERE / "configs"
    return tuple(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")))


def named_config(name: str, *, devices: int = 1) -> str | None:
    """The text of a registered config, ours or torchtune's; None if there is none of that name.

    Where both have a name that differs in capitals only, as typed decides: llama2/7b_lora is ours, and llama2/7B_lora
    torchtune's. ConfigError for a name of torchtune's that is a verb here.
    """
    if name in config_names():
        return (HERE / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    theirs = torchtune.own_name(name)
    if theirs is None:
        return None
    if theirs in torchtune.ELSEWHERE:
        raise ConfigError([f"{name}: {torchtune.ELSEWHERE[theirs]}"])
    return torchtune.config_text(theirs, devices)


def find_config(name: str | Path) -> Path:
    """The path of a YAML file; ConfigError says what else the name may have meant."""
    text = str(name)
    if text.startswith("~/"):
        from tt_ckpt.safe_names import from_home

        text = str(from_home(name))
    path = Path(text)
    if "://" in text:
        raise ConfigError([f"{name}: an address, not a file; download it, look at it, and name the file"])
    if path.suffix == ".py":
        raise ConfigError([f"{name}: a recipe file, not a config; tt run {shell_word(name)} ..."])
    if path.name.lower().endswith((".jsonl", ".csv", ".parquet", ".gz", ".zst")):
        raise ConfigError([f"{name}: a file of rows, not a config; tt data show {shell_word(name)} --tokenizer MODEL"])
    if os.path.isfile(text):  # noqa: PTH113  (False for a name too long to be one)
        return path
    if os.path.isdir(text):  # noqa: PTH112
        raise ConfigError([f"{name}: a folder, not a config; {_in_folder(path)}"])
    if os.path.lexists(text):  # a pipe, a device or a broken link: reading says which
        return path
    known = [*torchtune.PAIRS, *config_names()]  # of names that differ in capitals only, ours is suggested
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        siblings = [str(file) for file in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []  # noqa: PTH112
        hint = did_you_mean(text, [*siblings, *known]) or "; tt ls configs lists those that come with it"
        raise ConfigError([f"{name}: no such config file (looked in {Path.cwd()}){hint}"])
    if text in RECIPES:
        raise ConfigError([f"{name}: a recipe, not a config; tt ls configs lists those"])
    if text in torchtune.ELSEWHERE:
        raise ConfigError([f"{name}: {torchtune.ELSEWHERE[text]}"])
    known = [
        *RECIPES,
        *torchtune.RECIPES,
        *known,
        *(file.name for kind in ("*.y*ml", "*.py") for file in Path().glob(kind)),
    ]
    raise ConfigError(
        [f"{name}: neither a recipe, a registered config nor a file{did_you_mean(text, known)}; see tt ls"]
    )


def _in_folder(folder: Path) -> str:
    if (folder / "config.yaml").is_file():
        return f"give the config in it, {folder / 'config.yaml'}"
    if (folder / "config.json").is_file():
        return f"a model is named by a key: tt run sft {shell_word(f'model.path={folder}')}"
    files = sorted(file.name for kind in ("*.yaml", "*.yml", "*.py") for file in folder.glob(kind))
    return f"name a file in it, such as {folder / files[0]}" if files else "give a YAML file or a registered name"


def losses_of(loss: "LossSection") -> dict[str, str]:
    """The losses that ``loss.name`` may be, with where each is."""
    if hasattr(loss, "beta"):  # a PreferenceSection
        return {name: f"tt_train.losses.preferences.{name}" for name in PREFERENCE_LOSSES}
    return LOSSES


def name_mistakes(config: "RunConfig", allow_import: Sequence[str]) -> list[str]:
    """Component names that are neither registered nor allowed to be imported."""
    named = [
        ("optimizer.name", config.optimizer.name, OPTIMIZERS),
        ("loss.name", config.loss.name, losses_of(config.loss)),
    ]
    named += [("loggers", logger, LOGGERS) for logger in logger_options(config)]
    found = option_mistakes(logger_options(config))
    for key, name, known in named:
        if name in known:
            continue
        module = name.rpartition(".")[0]
        ours = next((ours for ours, path in known.items() if path == name), None) or _ELSEWHERE.get(name)
        if not module or ours:
            hint = f"; did you mean {ours!r}?" if ours in known else did_you_mean(name, known)
            found.append(f"{key}: unknown name {name!r}{hint}; known: {', '.join(known)}")
        elif module not in allow_import:
            found.append(f"{key}: {name!r} is a dotted path; to let it be imported, add --allow-import {module}")
        else:
            _ALLOWED.add(name)
            found += _import_mistakes(key, name, module, allow_import)
    return found


def _import_mistakes(key: str, name: str, module: str, allow_import: Sequence[str]) -> list[str]:
    """What is wrong with a dotted name that may be imported; afterwards ``resolve`` finds it."""
    try:
        with finding_modules_here(allow_import):
            resolve(name, {})
    except ModuleNotFoundError as error:
        files = [path.stem for path in Path().glob("*.py")]
        near = did_you_mean(module, files) or f"; neither installed nor in {Path.cwd()}"
        if error.name != module:
            near = f"; add --allow-import {error.name}" if error.name in files else f"; install {error.name}"
        return [f"{key}: {name!r} cannot be imported: {error}{near}"]
    except AttributeError:
        found = sys.modules[module]
        near = did_you_mean(name.rpartition(".")[2], vars(found))
        return [f"{key}: {name!r} cannot be imported: {getattr(found, '__file__', module)} has no such name{near}"]
    except Exception as error:  # the module's own
        return [f"{key}: {name!r} cannot be imported: {type(error).__name__}: {error}; correct {module}"]
    return []


def allowed_import(key: str, name: str, allow_import: Sequence[str]) -> Any:
    """The object of a dotted name that the command line allows; ConfigError says what is wrong with it."""
    module = name.rpartition(".")[0]
    if module not in allow_import:
        raise ConfigError([f"{key}: {name!r} is code of yours; to let it be imported, add --allow-import {module}"])
    _ALLOWED.add(name)
    if problems := _import_mistakes(key, name, module, allow_import):
        raise ConfigError(problems)
    return resolve(name, {})


def imports_of(config: "RunConfig") -> dict[str, str | None]:
    """The modules behind dotted names of a config, each with the SHA-256 of its file: a run is what they say, too."""
    found: dict[str, str | None] = {}
    for name in (config.optimizer.name, config.loss.name, *logger_options(config)):
        module = name.rpartition(".")[0]
        if module in sys.modules:
            file = getattr(sys.modules[module], "__file__", None)
            found[module] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    return found


_ALLOWED: set[str] = set()  # dotted names that this process was allowed to import, on its command line


def resolve(name: str, known: dict[str, str]) -> Any:
    """The object behind a registered name, or behind a dotted path that ``--allow-import`` admitted."""
    if name not in known and name not in _ALLOWED:
        raise ConfigError([f"{name!r} is not registered{did_you_mean(name, known)}; known: {', '.join(known)}"])
    module, _, attribute = known.get(name, name).rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def finding_modules_here(allow_import: Sequence[str]) -> Iterator[None]:
    """Inside, the modules that the user allows, and no others, are found in the working folder, too.

    What is installed comes first, so that a file of the folder takes no other module's place.
    """
    finder = _AllowedHere({name.partition(".")[0] for name in allow_import})
    sys.meta_path.append(finder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _AllowedHere(importlib.abc.MetaPathFinder):
    def __init__(self, names: set[str]) -> None:
        self.names, self.here = names, str(Path.cwd())

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None or fullname not in self.names:
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [self.here])
