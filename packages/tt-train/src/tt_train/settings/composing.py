"""From a recipe's name or a YAML file, and ``key=value`` words, to a checked config; every mistake is collected."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tt_train.config import SCHEMAS, RunConfig, SFTConfig
from tt_train.errors import ConfigError, did_you_mean
from tt_train.settings import registry
from tt_train.settings.keys import schema as keys
from tt_train.settings.keys.mistakes import missing, mistakes
from tt_train.settings.keys.paths import at_home
from tt_train.settings.keys.text import NotPlainError, compose_text, pairs, read_text
from tt_train.settings.keys.values import fits, of_node, of_word
from tt_train.settings.keys.wrong_type import shown, type_problem
from tt_train.settings.recipe_file import RecipeFile, check_recipe, load_recipe_file, schema_of

Setting = tuple[str, Any, str]  # dotted key, value, where it was written ("lora.yaml:3" or "the command line")
COMMAND_LINE = "the command line"
MOST_PROBLEMS = 30  # lines that are shown at once


def compose(
    recipe_or_config: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_import: Sequence[str] = (),
    schema: type[RunConfig] | None = None,
    complete: bool = True,
    devices: int = 1,
) -> RunConfig:
    """Read a config: defaults of the recipe's dataclass, then a YAML file, then ``overrides``.

    Args:
        recipe_or_config: a recipe's name, the path of a recipe file (``.py``; its code is run), a registered config's
            name, or the path of a YAML file that names its recipe.
        config: a YAML file or registered name, when ``recipe_or_config`` is a recipe.
        overrides: words such as ``adapter.rank=8``, split at the first ``=``; text is taken as typed.
        allow_import: modules from which dotted names may be imported, installed or in the working folder.
        complete: False accepts a config that lacks what only a run needs, to look at it.
        schema: the config's dataclass; that of the recipe by default.
        devices: the processes that will train, which share ``batch_size``; in a config of torchtune it is that of one.

    Raises:
        ConfigError: with one line for every unknown key, wrong type and impossible value.
    """
    what = str(recipe_or_config)
    is_file = what.endswith(".py")
    typed = load_recipe_file(Path(what), allow_import) if is_file else registry.RECIPES.get(what)
    if config is not None and typed is None:
        registry.recipe_path(what)  # says what is wrong with it
    file = _source(config or what, devices) if config is not None or typed is None else None
    if schema is None:
        named = None if isinstance(typed, RecipeFile) else typed or _recipe_named(file, overrides)
        schema = schema_of(typed) if isinstance(typed, RecipeFile) else SCHEMAS.get(named or "", SFTConfig)
    problems: list[str] = []
    settings = list(_settings_in(file, schema, problems)) if file else []
    settings += _read_words(overrides, schema, problems)
    problems += [f"{where}: {key}: {problem}" for key, value, where in settings if key in ("recipe", "recipe_sha256")
                 and (problem := _setting_problem(schema, key, value))]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    said, where = next(
        ((str(value), where) for key, value, where in reversed(settings) if key == "recipe" and value), ("sft", "")
    )
    sha256 = next((value for key, value, _ in reversed(settings) if key == "recipe_sha256"), None)
    if said.endswith(".py"):
        check_recipe(said, sha256, where, file.path if file else None, typed)
    elif said not in registry.RECIPES:
        known = registry.recipe_names()
        raise ConfigError([f"{where}: recipe: unknown recipe {said!r}{did_you_mean(said, known)}; see tt ls recipes"])
    elif isinstance(typed, str) and where and typed != registry.RECIPES[said]:
        raise ConfigError([f"{where}: recipe: this config is for {said}, not for {typed}; tt run {said} ..."])
    settings = [setting for setting in settings if setting[0] not in ("recipe", "recipe_sha256")]
    result: RunConfig = _merge(schema, settings, problems)
    if not problems:
        result = at_home(result)
        result.recipe = typed.name if isinstance(typed, RecipeFile) else typed or registry.RECIPES[said]
        result.recipe_sha256 = typed.sha256 if isinstance(typed, RecipeFile) else None
        lacking = missing(result) if complete else []
        problems = [*mistakes(result, devices), *registry.name_mistakes(result, allow_import), *lacking]
    if problems:
        raise ConfigError(problems)
    return result


class _Source(NamedTuple):
    """A config: its text, what to call it, and its path unless it is a registered one."""

    text: str
    name: str
    path: Path | None


def _source(name: str | Path, devices: int) -> _Source:
    text = None if os.path.isfile(name) else registry.named_config(str(name), devices=devices)  # noqa: PTH113
    if text is not None:
        return _Source(text, str(name), None)
    path = registry.find_config(name)
    return _Source(read_text(path, "config"), str(path), path)


def _recipe_named(file: _Source | None, words: Sequence[str]) -> str:
    """The recipe that a config asks for: its schema says how the other keys are read."""
    settings = [*(_settings_in(file, RunConfig, []) if file else ()), *_read_words(words, RunConfig, [])]
    said = next((str(value) for key, value, _ in reversed(settings) if key == "recipe" and value), "sft")
    return registry.RECIPES.get(said, said)


def compose_run(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run directory, without the code of its recipe: keys of the recipe's own are left out."""
    problems: list[str] = []
    known = set(keys.all_keys(RunConfig))
    path = run / "config.yaml"
    file = _Source(read_text(path, "config", root=run), str(path), path)
    settings = [setting for setting in _settings_in(file, RunConfig, problems) if setting[0] in known]
    settings += _read_words(overrides, RunConfig, problems)
    result: RunConfig = _merge(RunConfig, settings, problems)
    if problems or (problems := mistakes(result)):
        raise ConfigError(problems)
    return result


def _settings_in(file: _Source, schema: type, problems: list[str]) -> Iterator[Setting]:
    """The settings of a YAML file, each with the line that it is on."""
    text, path, _ = file
    if not text.strip():
        raise ConfigError([f"{path}: empty; a config has keys and values, such as 'batch_size: 16'"])
    try:
        top = compose_text(text)
    except NotPlainError as error:
        problems.append(f"{path}:{error.place}: {error}")
        return
    if top is None:  # comments alone
        return
    if not isinstance(top, yaml.MappingNode):
        problems.append(f"{path}:1: a config is keys and values, such as 'batch_size: 16', not a list or a text")
        return
    yield from _walk(top, "", path, schema, problems)


def _walk(node: yaml.MappingNode, prefix: str, place: str, schema: type, problems: list[str]) -> Iterator[Setting]:
    """The settings inside ``node``; ``place``: the file, or the command line, where lines mean nothing."""
    seen: dict[str, int] = {}
    in_file = place != COMMAND_LINE
    try:
        inside = pairs(node)
    except NotPlainError as error:
        problems.append(f"{place}:{error.place}: {error}" if in_file else f"{place}: {error}")
        return
    for name, key_node, value_node in inside:
        key, line = prefix + name, key_node.start_mark.line + 1
        where = f"{place}:{line}" if in_file else place
        if key in seen:
            problems.append(f"{where}: {key} is given twice (first on line {seen[key]}); keep one")
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode) and value_node.value and keys.is_section(schema, key):
            yield from _walk(value_node, key + ".", place, schema, problems)
            continue
        try:
            yield key, of_node(value_node, _kind(schema, key)), where
        except NotPlainError as error:
            problems.append(f"{place}:{error.place}: {key}: {error}" if in_file else f"{place}: {key}: {error}")


def _kind(schema: type, key: str) -> Any:
    """The type that ``key`` takes; anything where there is no such key, which is answered later."""
    try:
        return keys.type_of(schema, key)
    except KeyError:
        return Any


def _read_words(words: Sequence[str], schema: type, problems: list[str]) -> Iterator[Setting]:
    """``key=value`` words of the command line."""
    for word in _whole_words(words, problems):
        key, sign, text = word.partition("=")
        key = key.strip()
        if word.startswith("-") or not sign or not key:
            problems.append(_not_a_word(word, schema))
        elif not text.strip():
            problems.append(f"{key}: no value; write {key}=null to unset it (a shell variable that is not set?)")
        elif keys.is_section(schema, key) and text.lstrip().startswith("{") and (section := _mapping(text)) is not None:
            yield from _walk(section, key + ".", COMMAND_LINE, schema, problems)
        else:
            try:
                yield key, of_word(text, _kind(schema, key)), COMMAND_LINE
            except ValueError as error:
                problems.append(f"{COMMAND_LINE}: {key}: {error}")


def _not_a_word(word: str, schema: type) -> str:
    """What is wrong with a word that is not ``key=value``."""
    key, sign, value = word.partition(":")
    if sign and value and key in set(keys.all_keys(schema)):
        return f"{word}: write {key}={value.strip()}, with = instead of :"
    return f"{word}: expected key=value, such as adapter.rank=8 (options come before, keys have no dashes)"


def _whole_words(words: Sequence[str], problems: list[str]) -> Iterator[str]:
    """The words, but those that a shell has cut apart: ``key = value`` and ``key={a: 1}`` without quotes."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        value = word.partition("=")[2].lstrip()
        if value[:1] in ("{", "[") and value[-1] not in ("}", "]") and any(part[-1:] in ("}", "]") for part in rest):
            while not word.endswith(("}", "]")):
                word += f" {rest.pop(0)}"
            problems.append(f"{word}: a value with spaces needs quotes: '{word}'")
        elif rest and (rest[0] == "=" or (word.endswith(("=", ":")) and "=" not in rest[0])):
            parts = [word, rest.pop(0)]
            parts += [rest.pop(0)] if parts[1] == "=" and rest else []
            problems.append(f"{' '.join(parts)}: write {word.rstrip('=:')}={parts[-1]}, without spaces")
        else:
            yield word


def _mapping(text: str) -> yaml.MappingNode | None:
    try:
        node = compose_text(text)
    except NotPlainError:
        return None
    return node if isinstance(node, yaml.MappingNode) and node.value else None


def _merge(schema: type, settings: list[Setting], problems: list[str]) -> Any:
    """The schema with every setting; a line in ``problems`` for each that it cannot take."""
    from omegaconf.errors import OmegaConfBaseException

    accepted: list[Setting] = []
    for key, value, where in settings:
        if len(problems) >= MOST_PROBLEMS:
            problems.append(f"{where}: and perhaps more from here on; correct these first")
            return None
        if problem := _setting_problem(schema, key, value):
            problems.append(f"{where}: {key}: {problem}")
        else:
            accepted.append((key, value, where))
    refusals = (OmegaConfBaseException, ValueError, TypeError, OverflowError)
    try:
        return _merged(schema, accepted)
    except refusals:
        for key, value, where in accepted:
            try:
                _merged(schema, [(key, value, where)])
            except refusals:
                problems.append(f"{where}: {key}: {type_problem(schema, key, value)}")
        if not problems:
            raise
    return None


def _merged(schema: type, settings: Sequence[Setting]) -> Any:
    """One merge through OmegaConf's structured configs, which convert and check types; a later setting wins."""
    from omegaconf import OmegaConf

    nested: dict[str, Any] = {}
    whole: dict[str, Any] = {}  # names given anew replace those before
    for key, value, _ in settings:
        *sections, last = keys.parts_of(schema, key)
        node = nested
        for name in sections:
            if not isinstance(node.get(name), dict):
                node[name] = {item: {} for item in node.get(name) or []}  # a list of names that get options
            node = node[name]
        node[last] = dict(value) if isinstance(value, dict) else value
        if isinstance(value, dict) and keys.section_type(keys.type_of(schema, key)) is None:
            whole[key] = node
    named = {key: nested.pop(key) for key in list(nested) if keys.takes_options(keys.type_of(schema, key))}
    merged = OmegaConf.merge(OmegaConf.structured(schema), nested)
    for key, names in named.items():  # a list or a mapping, which OmegaConf does not merge with each other
        OmegaConf.update(merged, key, names, merge=False)
    for key, node in whole.items():
        value = node.get(key.rpartition(".")[2])
        if isinstance(value, dict):
            OmegaConf.update(merged, key, value, merge=False)
    return OmegaConf.to_object(merged)


def _setting_problem(schema: type, key: str, value: Any) -> str | None:
    """Why a key cannot have this value, as far as its name and type say."""
    try:
        kind = keys.type_of(schema, key)
    except KeyError as error:
        outer = key.rsplit(".", 1)[0]
        return keys.unknown_key(schema, key) if error.args[1] else f"{outer} has no keys inside; write {outer}=VALUE"
    if "${" in str(value) or "???" in _words_in(value):
        return f"interpolation ({shown(value)}) is off, since it can read the environment; write the value"
    return None if fits(value, kind) else type_problem(schema, key, value)


def _words_in(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [word for name, inner in value.items() for word in (name, *_words_in(inner))]
    return [word for inner in value for word in _words_in(inner)] if isinstance(value, list) else [value]
