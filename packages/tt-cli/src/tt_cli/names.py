"""Recipes, configs and their keys by name: looked up, and completed in the shell. Imports no torch."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from tt_train.errors import did_you_mean, shell_word
from tt_train.settings import registry
from tt_train.settings.torchtune import names as torchtune

if TYPE_CHECKING:
    from tt_train.config import RunConfig

_FROM_NOTHING = "a run with model.name instead of model.path starts from random weights: tt run sft model.name=NAME"
_SERVE = "tt does not serve models; tt export RUN -o DIR prints the commands for vLLM, llama.cpp and Ollama"
_NO_PAGE = "tt has no web page to work in; tt quickstart shows the commands"
_LOGIN = "tt reads the token from HF_TOKEN, or the one that `hf auth login` has stored"
_ONLINE = "tt has no recipe that generates while it trains; tt run dpo learns from preferences"
# what other tools call a verb: ours, with its first words, or what to do
ELSEWHERE = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "finetune-lora", "finetune-full", "finetune-qlora", "lora",
                     "qlora", "tune", "launch"), "run"),
    **dict.fromkeys(("finetune-adapter", "finetune-adapter-v2"), "run sft adapter.rank=8"),
    **{name: f"run dpo loss.name={name}" for name in ("kto", "orpo", "simpo", "ipo")}, "cpo": "run dpo",
    **dict.fromkeys(("distill", "gkd"), "run kd"), **dict.fromkeys(("grpo", "rloo", "ppo", "online-dpo"), _ONLINE),
    "pretrain": _FROM_NOTHING, "resume": "run --resume auto", "continue": "run --resume auto",
    **dict.fromkeys(("serve", "server", "api", "vllm-serve", "deploy", "host"), _SERVE),
    **dict.fromkeys(("webui", "webchat", "studio", "ui", "board"), _NO_PAGE),
    **dict.fromkeys(("login", "auth", "logout"), _LOGIN),
    **dict.fromkeys(("infer", "inference", "predict", "complete", "sample"), "generate"), "talk": "chat",
    **dict.fromkeys(("evaluate", "evaluation", "lm-eval", "test", "perplexity", "eleuther-eval"), "eval"),
    **dict.fromkeys(("merge-lora", "fuse", "merge-adapter"), "merge"), "quantise": "quantize",
    **dict.fromkeys(("convert-checkpoint", "convert-hf-checkpoint", "convert-to-litgpt", "convert-from-litgpt",
                     "convert-pretrained-checkpoint", "gguf"), "convert"),
    **dict.fromkeys(("preprocess", "dataset", "tokenize", "preview", "prepare"), "data show"),
    **dict.fromkeys(("list", "models", "configs", "recipes", "runs"), "ls"), "copy": "cp", "fetch": "cp",
    **dict.fromkeys(("show", "print"), "cat"), **dict.fromkeys(("check", "lint", "dry-run"), "validate"),
    "push": "upload", **dict.fromkeys(("pull", "get"), "download"),
    **dict.fromkeys(("info", "version", "doctor", "diagnose", "about"), "env"), "plot": "report",
    **dict.fromkeys(("estimate-memory", "estimate", "benchmark"), "plan"), "demo": "quickstart", "init": "quickstart",
    **dict.fromkeys(("follow", "tail", "monitor", "status", "log", "logs"), "watch"),
    **dict.fromkeys(("rm", "prune", "clean", "cleanup", "gc"), "rm-checkpoints"),
}  # fmt: skip


def runnable_names() -> list[str]:
    """The names that `tt run`, `tt cat` and `tt cp` take: recipes, then configs."""
    return [*registry.recipe_names(), *registry.config_names(), *torchtune.RECIPES, *torchtune.PAIRS]


def source_of(name: str) -> tuple[str, str]:
    """(the name of a file, its text) of a registered recipe or config."""
    if name in registry.RECIPES:
        path = registry.recipe_path(name)
        return path.name, path.read_text(encoding="utf-8")
    if name in torchtune.ELSEWHERE:
        raise ValueError(f"{name}: {torchtune.ELSEWHERE[name]}")
    text = registry.named_config(name)
    if text is not None:
        return f"{Path(name).name}.yaml", text
    hint = did_you_mean(name, [*registry.RECIPES, *registry.config_names(), *torchtune.PAIRS])
    if Path(name).is_file():
        hint = "; this is already a file; copy it with cp"
    raise ValueError(f"no recipe or config '{name}'{hint} (`tt ls` lists them)")


def composed(
    what: str,
    config_file: str | None,
    overrides: tuple[str, ...],
    allow_import: tuple[str, ...],
    *,
    complete: bool = True,
    devices: int = 1,
) -> "RunConfig":
    """The checked config of WHAT: a recipe, a registered config, a YAML file or a recipe file."""
    from tt_train import compose

    for before, word in zip(("", *overrides), overrides, strict=False):
        if not before.endswith(("=", ":")):  # model.path = MODEL is answered as that
            _refuse_name(word, what)
    _answer_verb(what, config_file, overrides)
    is_config = is_config_name(what) or os.path.isfile(what)  # noqa: PTH113  (a name may be too long)
    if config_file is not None and is_config and not what.endswith(".py"):
        raise click.UsageError(
            f"--config goes with a recipe, but '{what}' is itself a config; give only one of the two"
        )
    return compose(
        what, config=config_file, overrides=overrides, allow_import=allow_import, complete=complete, devices=devices
    )


def _answer_verb(what: str, config_file: str | None, overrides: tuple[str, ...]) -> None:
    """What torchtune runs and is a verb here: ConfigError with the line that does it, with these KEY=VALUE words."""
    from tt_train.settings.torchtune.verbs import VERBS

    if (what.lower() if config_file is None else config_file.lower()) not in VERBS:
        return
    import yaml

    from tt_train import ConfigError

    words = [word.partition("=") for word in overrides]
    try:
        given = {key: yaml.safe_load(value) for key, _, value in words}
    except yaml.YAMLError:
        given = {}
    values, line = VERBS[what.lower() if config_file is None else config_file.lower()]
    raise ConfigError([f"{what}: a verb here: {line(values | given)}"])


def is_config_name(word: str) -> bool:
    """Whether a word is the name of a registered config, ours or torchtune's."""
    return word in registry.config_names() or torchtune.own_name(word) is not None


def _refuse_name(word: str, what: str) -> None:
    """A recipe, a config or a file of rows after WHAT, where only KEY=VALUE words may be."""
    if "=" in word:
        return
    if word.endswith((".yaml", ".yml")) or is_config_name(word):
        raise click.UsageError(f"'{word}' is not KEY=VALUE; did you mean --config {shell_word(word)}?")
    if word in registry.RECIPES:
        known = what in registry.RECIPES
        cure = "the recipe is given already" if known else f"write {word} --config {shell_word(what)}"
        if "=" in what:
            cure = f"the recipe comes first: {word} {shell_word(what)}"
        raise click.UsageError(f"'{word}' is not KEY=VALUE; {cure}")
    if word.lower().endswith((".jsonl", ".json", ".csv", ".parquet")):
        raise click.UsageError(f"'{word}' is not KEY=VALUE; did you mean {shell_word(f'data.train={word}')}?")
    if os.path.isfile(f"{word}/config.json"):  # noqa: PTH113
        raise click.UsageError(f"'{word}' is not KEY=VALUE; did you mean {shell_word(f'model.path={word}')}?")


def refuse_run(name: str) -> None:
    """A run directory is not a folder of rows."""
    from tt_train.records.run_files import is_run

    if is_run(Path(name)):
        raise ValueError(f"{name} is a run directory, not rows; give its config, {Path(name) / 'config.yaml'}")


def complete_runs(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Run directories under ./runs, newest first; else files and folders.

    A name that a shell would have to quote is left to the shell, which knows how.
    """
    from tt_train.records.run_files import is_run

    runs = [path for path in Path("runs").glob("*") if is_run(path) and shell_word(path) == str(path)]
    runs.sort(key=lambda path: -(path / "manifest.json").stat().st_mtime_ns)
    found = [CompletionItem(str(path)) for path in runs if str(path).startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_runnable(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names first, and files for those who have their own."""
    named = [CompletionItem(name) for name in runnable_names() if name.startswith(incomplete)]
    return named or [CompletionItem(incomplete, type="file")]


def complete_config(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Configs by name, and files."""
    names = [*registry.config_names(), *torchtune.PAIRS]
    named = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return named or [CompletionItem(incomplete, type="file")]


def config_keys() -> list[str]:
    """Every key that a config of some recipe may have, dotted; not the hash of a recipe file, which a run writes."""
    from tt_train.config import SCHEMAS
    from tt_train.settings.keys.schema import all_keys

    keys = dict.fromkeys(key for schema in SCHEMAS.values() for key in all_keys(schema))
    return [key for key in keys if key != "recipe_sha256"]


def complete_keys(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of the recipe's config with their ``=``, and after it the values that a key takes, or files."""
    from tt_train.config import SCHEMAS
    from tt_train.settings.keys.schema import all_keys, is_section, type_of

    recipe = registry.RECIPES.get(ctx.params.get("what") or "")
    schemas = [SCHEMAS[recipe]] if recipe in SCHEMAS else list(SCHEMAS.values())
    key, sign, value = incomplete.partition("=")
    if not sign:
        keys = dict.fromkeys(key for schema in schemas for key in all_keys(schema) if not is_section(schema, key))
        return [CompletionItem(f"{key}=") for key in keys if key.startswith(incomplete) and key != "recipe_sha256"]
    for schema in schemas:
        with suppress(KeyError):
            values = [word for word in _values(key, type_of(schema, key)) if word.startswith(value)]
            return [CompletionItem(f"{key}={word}") for word in values] or [CompletionItem(value, type="file")]
    return []


def _values(key: str, kind: Any) -> list[str]:
    """The words that a key of this type takes; none if it takes other values."""
    from tt_train.settings.keys.mistakes import CHOICES
    from tt_train.settings.keys.schema import plain

    if key == "optimizer.name":
        return list(registry.OPTIMIZERS)
    return list(CHOICES.get(key, ())) or (["true", "false"] if plain(kind)[0] is bool else [])
