"""From a recipe's name or a YAML file, and ``key=value`` words, to a checked config; every mistake is collected."""

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from tt_train.errors import ConfigError, did_you_mean
from tt_train.keys import all_keys, is_section, parts_of, plain, section_type, type_of, unknown_key
from tt_train.values import PlainLoader, fits, of_node, of_word

if TYPE_CHECKING:
    from tt_train.config import RunConfig

Setting = tuple[str, Any, str]  # dotted key, value, where it was written ("lora.yaml:3" or "the command line")


def compose(
    recipe_or_config: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_import: Sequence[str] = (),
    schema: "type[RunConfig] | None" = None,
    complete: bool = True,
) -> "RunConfig":
    """Read a config: defaults of the recipe's dataclass, then a YAML file, then ``overrides``.

    Args:
        recipe_or_config: a recipe's name, the path of a recipe file (``.py``; its code is run), a registered config's
            name, or the path of a YAML file that names its recipe.
        config: a YAML file or registered name, when ``recipe_or_config`` is a recipe.
        overrides: words such as ``adapter.rank=8``, split at the first ``=``; text is taken as typed.
        allow_import: modules from which dotted names may be imported, installed or in the working folder.
        complete: False accepts a config that lacks what only a run needs, to look at it.
        schema: the config's dataclass; that of the recipe by default.

    Raises:
        ConfigError: with one line for every unknown key, wrong type and impossible value.
    """
    from tt_train import registry
    from tt_train.config import SFTConfig, missing, mistakes
    from tt_train.paths import at_home
    from tt_train.recipe_file import RecipeFile, check_recipe, load_recipe_file, schema_of

    what = str(recipe_or_config)
    typed: str | RecipeFile | None = registry.RECIPES.get(what)
    if what.endswith(".py"):
        typed = load_recipe_file(Path(what), allow_import)
    if config is not None and typed is None:
        registry.recipe_path(what)  # says what is wrong with it
    file = registry.find_config(config or what) if config is not None or typed is None else None
    if schema is None:
        schema = schema_of(typed) if isinstance(typed, RecipeFile) else SFTConfig
    problems: list[str] = []
    settings = list(_read_file(file, schema, problems)) if file else []
    settings += _read_words(overrides, schema, problems)
    if problems:
        raise ConfigError(problems)
    said, where = next(
        ((str(value), where) for key, value, where in reversed(settings) if key == "recipe" and value), ("sft", "")
    )
    sha256 = next((value for key, value, _ in reversed(settings) if key == "recipe_sha256"), None)
    if said.endswith(".py"):
        check_recipe(said, sha256, where, file, typed)
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
        problems += mistakes(result) + registry.name_mistakes(result, allow_import)
        problems += missing(result) if complete else []
    if problems:
        raise ConfigError(problems)
    return result


def compose_run(run: Path, overrides: Sequence[str] = ()) -> "RunConfig":
    """The config of a run directory, without the code of its recipe: keys of the recipe's own are left out."""
    from tt_train.config import RunConfig, mistakes

    problems: list[str] = []
    known = set(all_keys(RunConfig))
    settings = [setting for setting in _read_file(run / "config.yaml", RunConfig, problems) if setting[0] in known]
    settings += _read_words(overrides, RunConfig, problems)
    result: RunConfig = _merge(RunConfig, settings, problems)
    if problems or (problems := mistakes(result)):
        raise ConfigError(problems)
    return result


def _read_file(path: Path, schema: type, problems: list[str]) -> Iterator[Setting]:
    """The settings of a YAML file, each with the line that it stands on."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=PlainLoader)
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        cause = str(getattr(error, "problem", None) or error)
        cure = "; a value with ': ' in it needs quotes" if "mapping values" in cause else ""
        problems.append(f"{path}{line}: not YAML: {cause}{cure}")
        return
    except RecursionError:
        problems.append(f"{path}: nested too deeply to be a config")
        return
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{path}:1: expected keys and values, such as 'batch_size: 16'")
        return
    yield from _walk(root, "", path, schema, problems)


def _walk(node: yaml.MappingNode, prefix: str, path: Path, schema: type, problems: list[str]) -> Iterator[Setting]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = prefix + str(key_node.value)
        if key_node.value == "<<":
            problems.append(f"{where}: merge keys (<<) are not read; write the keys that they stand for")
            continue
        if key in seen:
            problems.append(f"{where}: {key} stands twice (first on line {seen[key]}); keep one")
        seen[key] = key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode) and value_node.value and is_section(schema, key):
            yield from _walk(value_node, key + ".", path, schema, problems)
            continue
        try:
            yield key, of_node(value_node, _kind(schema, key)), where
        except yaml.YAMLError as error:
            problems.append(f"{where}: {key}: {getattr(error, 'problem', error)}; only plain YAML values are read")


def _kind(schema: type, key: str) -> Any:
    """The type that ``key`` takes; anything where there is no such key, which is answered later."""
    try:
        return type_of(schema, key)
    except KeyError:
        return Any


def _read_words(words: Sequence[str], schema: type, problems: list[str]) -> Iterator[Setting]:
    """``key=value`` words of the command line."""
    where = "the command line"
    for word in _whole_words(words, problems):
        key, sign, text = word.partition("=")
        key = key.strip()
        if word.startswith("-") or not sign or not key:
            problems.append(
                f"{word}: expected key=value, such as adapter.rank=8 (options come before, keys have no dashes)"
            )
        elif not text.strip():
            problems.append(f"{key}: no value; write {key}=null to unset it (a shell variable that is not set?)")
        elif is_section(schema, key) and text.lstrip().startswith("{") and (section := _mapping(text)) is not None:
            yield from (
                (name, value, where) for name, value, _ in _walk(section, key + ".", Path(where), schema, problems)
            )
        else:
            yield key, of_word(text, _kind(schema, key)), where


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
        node = yaml.compose(text, Loader=PlainLoader)
    except yaml.YAMLError:
        return None
    return node if isinstance(node, yaml.MappingNode) and node.value else None


def _merge(schema: type, settings: list[Setting], problems: list[str]) -> Any:
    """Set each key on the schema through OmegaConf's structured configs, which convert and check types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(schema)
    for key, value, where in settings:
        try:
            kind = type_of(schema, key)
        except KeyError as error:
            cause = unknown_key(schema, key) if error.args[1] else f"{key.rsplit('.', 1)[0]} has no keys inside"
            problems.append(f"{where}: {key}: {cause}")
            continue
        if "${" in str(value) or value == "???":
            problems.append(
                f"{where}: {key}: interpolation ({value}) is off, since it can read the environment; write the value"
            )
            continue
        if not fits(value, kind):
            problems.append(f"{where}: {key}: {_type_problem(key, kind, value)}")
            continue
        nested: Any = value
        for part in reversed(parts_of(schema, key)):
            nested = {part: nested}
        try:
            merged = OmegaConf.merge(merged, nested)
            if isinstance(value, dict) and section_type(kind) is None:  # names given anew replace those before
                OmegaConf.update(merged, key, value, merge=False)
        except (OmegaConfBaseException, ValueError, TypeError):
            problems.append(f"{where}: {key}: {_type_problem(key, kind, value)}")
    return OmegaConf.to_object(merged)


# where other tools take a part of something
_INSTEAD_OF_A_SHARE = {
    "epochs": "; a part of an epoch is given by max_steps",
    "eval_every": "; it counts steps, not a share of the run",
    "save_every": "; it counts steps, not a share of the run",
    "schedule.warmup_steps": "; a share of the run is schedule.warmup_ratio",
}


def _type_problem(key: str, kind: Any, value: Any) -> str:
    inner, optional = plain(kind)
    cure = ""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(inner) is Annotated:
        return f"expected text or a list of text, got {value!r}; a name with ': ' in it needs quotes"
    containers = {list: "a list such as [a, b]", tuple: "a list such as [0.9, 0.95]", dict: "names such as {a: b}"}
    if section := section_type(inner):
        keys = typing.get_type_hints(section)
        expected = f"keys ({', '.join(keys)})"
        cure = f"; did you mean {key}.{next(iter(keys))}?"
    else:
        expected = names.get(inner) or containers.get(typing.get_origin(inner) or inner) or str(inner)
    if isinstance(value, float):
        cure = _INSTEAD_OF_A_SHARE.get(key, cure)
    got = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return f"expected {expected}{' or null' if optional else ''}, got {got}{cure}"
