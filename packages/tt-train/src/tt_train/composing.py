"""From a recipe's name or a YAML file, and ``key=value`` words, to a checked config; every mistake is collected."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tt_train.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from tt_train.config import SFTConfig

# what other tools call our keys
_SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "dataset": "data.train",
    "train_on_input": "data.train_on",
    "cutoff_len": "data.max_seq_len",
    "sequence_len": "data.max_seq_len",
    "max_length": "data.max_seq_len",
    "gradient_checkpointing": "activation_checkpointing",
    "enable_activation_checkpointing": "activation_checkpointing",
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "warmup_steps": "schedule.warmup_steps",
    "max_norm": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
}

Setting = tuple[str, Any, str]  # dotted key, value, where it was written ("lora.yaml:3" or "the command line")


def compose(
    recipe_or_config: str | Path,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_import: Sequence[str] = (),
    schema: "type[SFTConfig] | None" = None,
    complete: bool = True,
) -> "SFTConfig":
    """Read a config: defaults of the recipe's dataclass, then a YAML file, then ``overrides``.

    Args:
        recipe_or_config: a recipe's name, a registered config's name, or the path of a YAML file that names its recipe.
        config: a YAML file or registered name, when ``recipe_or_config`` is a recipe.
        overrides: words such as ``adapter.rank=8``; values are YAML, split at the first ``=``.
        allow_import: modules from which dotted names may be imported.
        complete: False accepts a config that lacks what only a run needs, to look at it.
        schema: the config's dataclass where a recipe of one's own adds keys to SFTConfig.

    Raises:
        ConfigError: with one line for every unknown key, wrong type and impossible value.
    """
    from tt_train import registry
    from tt_train.config import SFTConfig, missing, mistakes

    file = _config_file(recipe_or_config, config)
    problems: list[str] = []
    schema = schema or SFTConfig
    settings = list(_read_file(file, schema, problems)) if file else []
    settings += _read_words(overrides, problems)
    if problems:
        raise ConfigError(problems)
    recipe = next((value for key, value, _ in reversed(settings) if key == "recipe"), None)
    if file is None or str(recipe_or_config) in registry.RECIPES:
        recipe = str(recipe_or_config)
    if recipe is not None:
        recipe = registry.RECIPES.get(str(recipe), recipe)
        if recipe != "sft":
            known = registry.recipe_names()
            raise ConfigError(
                [f"recipe: unknown recipe {recipe!r}{did_you_mean(str(recipe), known)}; see tt ls recipes"]
            )
    settings = [setting for setting in settings if setting[0] != "recipe"]
    result: SFTConfig = _merge(schema, settings, problems)
    if not problems:
        problems += mistakes(result) + registry.name_mistakes(result, allow_import)
        problems += missing(result) if complete else []
    if problems:
        raise ConfigError(problems)
    return result


def _config_file(recipe_or_config: str | Path, config: str | Path | None) -> Path | None:
    from tt_train import registry

    if config is not None:
        return registry.find_config(config)
    return None if str(recipe_or_config) in registry.RECIPES else registry.find_config(recipe_or_config)


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; write the value again", event.start_mark
            )
        return super().compose_node(parent, index)


def _read_file(path: Path, schema: type, problems: list[str]) -> Iterator[Setting]:
    """The settings of a YAML file, each with the line that it stands on."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_PlainLoader)
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}")
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
        if key in seen:
            problems.append(f"{where}: {key} stands twice (first on line {seen[key]}); keep one")
        seen[key] = key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode) and value_node.value and _is_section(schema, key):
            yield from _walk(value_node, key + ".", path, schema, problems)
            continue
        try:
            yield key, _construct(value_node), where
        except yaml.YAMLError as error:
            problems.append(f"{where}: {key}: {getattr(error, 'problem', error)}; only plain YAML values are read")


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    return loader.construct_object(node, deep=True)


def _read_words(words: Sequence[str], problems: list[str]) -> list[Setting]:
    """``key=value`` words of the command line."""
    settings = []
    for word in words:
        key, sign, text = word.partition("=")
        if word.startswith("-") or not sign or not key:
            problems.append(
                f"{word}: expected key=value, such as adapter.rank=8 (options come before, keys have no dashes)"
            )
            continue
        try:
            value = yaml.load(text, Loader=_PlainLoader) if text else ""  # noqa: S506  (a SafeLoader)
        except yaml.YAMLError:
            value = text  # a path with odd characters is still a path
        settings.append((key.strip(), value, "the command line"))
    return settings


def _section_type(annotation: Any) -> type | None:
    """The dataclass inside ``X`` or ``X | None``."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)), None)


def _field_type(schema: type, key: str) -> Any:
    """The annotation at a dotted key; raises KeyError with the innermost schema and the part that is unknown."""
    part, _, rest = key.partition(".")
    hints = typing.get_type_hints(schema)
    if part not in hints:
        raise KeyError(part, schema)
    section = _section_type(hints[part])
    if rest and section is not None:
        return _field_type(section, rest)
    if rest and typing.get_origin(hints[part]) is not dict and hints[part] is not Any:
        raise KeyError(rest, None)
    return hints[part]


def _is_section(schema: type, key: str) -> bool:
    try:
        return _section_type(_field_type(schema, key)) is not None
    except KeyError:
        return False


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in typing.get_type_hints(schema).items():
        yield prefix + name
        if section := _section_type(annotation):
            yield from _all_keys(section, f"{prefix}{name}.")


def _unknown_key(schema: type, key: str) -> str:
    """``unknown key``, with the nearest: spelt alike, or the same word in another section."""
    if key.rsplit(".", 1)[-1] in _SYNONYMS:
        return f"unknown key; did you mean {_SYNONYMS[key.rsplit('.', 1)[-1]]!r}?"
    keys = list(_all_keys(schema))
    hint = did_you_mean(key, keys)
    last = key.rsplit(".", 1)[-1]
    homes = [known for known in keys if known.rsplit(".", 1)[-1] == last]
    if not homes and not hint:
        close = did_you_mean(last, [known.rsplit(".", 1)[-1] for known in keys])
        homes = [known for known in keys if close and known.rsplit(".", 1)[-1] in close.split("'")]
    return f"unknown key{f'; did you mean {homes[0]!r}?' if homes else hint}"


def _merge(schema: type, settings: list[Setting], problems: list[str]) -> Any:
    """Set each key on the schema through OmegaConf's structured configs, which convert and check types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(schema)
    for key, value, where in settings:
        try:
            annotation = _field_type(schema, key)
        except KeyError as error:
            cause = _unknown_key(schema, key) if error.args[1] else f"{key.rsplit('.', 1)[0]} has no keys inside"
            problems.append(f"{where}: {key}: {cause}")
            continue
        if "${" in str(value) or value == "???":
            problems.append(
                f"{where}: {key}: interpolation ({value}) is off, since it can read the environment; write the value"
            )
            continue
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        try:
            merged = OmegaConf.merge(merged, nested)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(f"{where}: {key}: {_type_problem(annotation, value, error)}")
    return OmegaConf.to_object(merged)


def _type_problem(annotation: Any, value: Any, error: Exception) -> str:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if section := _section_type(annotation):
        fields = ", ".join(typing.get_type_hints(section))
        return f"expected keys ({fields}){' or null' if type(None) in options else ''}, got {value!r}"
    if all(option in names for option in options):
        kind = "the text " if isinstance(value, str) else ""
        return f"expected {' or '.join(names[option] for option in options)}, got {kind}{value!r}"
    return (
        f"expected {getattr(annotation, '__name__', None) or annotation}, got {value!r} ({str(error).splitlines()[0]})"
    )
