"""A trained model as another program reads it, and the commands to run it there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch

import tt_ckpt
import tt_data
from tt_ckpt import commit
from tt_ckpt.files import copy
from tt_ckpt.formats.gguf.writer import GGUFWritten
from tt_ckpt.safe_names import from_home
from tt_ckpt.shown import plain
from tt_train.errors import ConfigError, did_you_mean
from tt_train.models.gguf import TYPES, Progress, write_adapter, write_model
from tt_train.models.merge import merge_run, refuse_full
from tt_train.models.modelfile import notes, ollama_modelfile
from tt_train.models.ollama import adds_bos, go_template
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.models.prompt_form import prompt_form, trained_on
from tt_train.models.servers import TRAINED_ON_NF4, adapter_commands, adapter_warnings, commands, largest_rank
from tt_train.records.run_files import read_json
from tt_train.run.serving import generation_settings

__all__ = ["FORMATS", "TYPES", "commands", "export", "go_template", "ollama_modelfile"]

FORMATS = ("hf", "gguf", "ollama")
_GGUF = "model.gguf"  # beside a Modelfile
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Exported(TypedDict):
    """``commands``: what to type to run what is at ``path`` elsewhere. ``warnings``: what differs there, or is refused.

    ``gguf``: the type, size and error of the GGUF file, if one was written.
    """

    path: str
    to: str
    adapter: bool
    dry_run: bool
    commands: list[str]
    warnings: list[str]
    gguf: GGUFWritten | None


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "hf",
    type: str | None = None,
    adapter: bool = False,
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    base: Base = None,
    tell: Callable[[str], None] | None = None,
    progress: Progress = None,
) -> Exported:
    """Write the model of a run, adapter or directory to ``output``, with adapters merged, and return how to run it.

    ``to``: ``hf`` is a Hugging Face directory, which vLLM and SGLang read; ``gguf`` a file for llama.cpp; ``ollama`` a
    directory with a Modelfile whose template renders as the model's own, and with a GGUF file if there is a ``type``.
    ``type``: of the matrices in a GGUF file (``TYPES``; default: as in the base). ``adapter``: only the adapter, for
    a server that has the base. ``base``: as in ``load``. ``tell`` receives sentences on what merging cost in
    precision and on what the other program does differently.

    Raises:
        ConfigError: unknown format; ``output`` is not empty; a template that no Modelfile can express.
        ValueError: a setting, tensor or tokenizer that a GGUF file cannot express; nothing is written.
    """
    _check_words(to, type, adapter=adapter, dtype=dtype)
    target, origin = from_home(output), find_origin(path, base)
    if to == "gguf":
        if target.suffix != ".gguf":
            name = plain(target)
            raise ConfigError([f"{name}: --to gguf writes one file, whose name ends in .gguf, such as {name}.gguf"])
    else:
        refuse_full(target)
    done = Exported(path=str(target), to=to, adapter=adapter, dry_run=dry_run, commands=[], warnings=[], gguf=None)
    if adapter:
        _export_adapter(origin, target, done, type, dry_run=dry_run, progress=progress)
    elif to == "gguf":
        done["gguf"] = write_model(origin, target, type, dry_run=dry_run, tell=tell, progress=progress)
        done["commands"] = commands(target, to)
    else:
        source = "." if type is None else f"./{_GGUF}"
        files, first = ollama_files(origin, tell, source) if to == "ollama" else ({}, None)
        if type is None:
            merge_run(path, target, dtype=dtype, base=base, files=files, dry_run=dry_run, tell=tell)
            if first is not None and not dry_run:
                say_first_token(target, first)
        else:
            done["gguf"] = write_model(
                origin, target / _GGUF, type, add_bos=first, dry_run=dry_run, tell=tell, progress=progress
            )
            for name, text in files.items() if not dry_run else ():
                commit.write_bytes(target / name, text.encode())
        done["commands"] = commands(target, to)
    done["warnings"] += done["gguf"].notes if done["gguf"] is not None else []
    if tell is not None:
        for sentence in done["warnings"]:
            tell(sentence)
    return done


def _check_words(to: str, type: str | None, *, adapter: bool, dtype: torch.dtype | None) -> None:
    if to not in FORMATS:
        raise ConfigError([f"--to: unknown format {to!r}{did_you_mean(to, FORMATS)}; known: {', '.join(FORMATS)}"])
    if type is not None and type.lower() not in TYPES:
        raise ConfigError([f"--type: unknown type {type!r}{did_you_mean(type, TYPES)}; known: {', '.join(TYPES)}"])
    if type is not None and to == "hf":
        raise ConfigError(["--type is of a GGUF file; use --to gguf or --to ollama with it, or --dtype with --to hf"])
    if dtype is not None and (to == "gguf" or type is not None or adapter):
        raise ConfigError(["--dtype is of a Hugging Face directory; use --type for a GGUF file, or --to hf"])
    if adapter and to == "ollama":
        raise ConfigError(["--adapter: not with --to ollama; use --to gguf, or leave out --adapter to merge it"])


def _export_adapter(
    origin: Origin, target: Path, done: Exported, type: str | None, *, dry_run: bool, progress: Progress
) -> None:
    """Only the adapter: as a GGUF file, or as a copy of its folder."""
    if origin.adapter is None or origin.model is None:
        raise ConfigError([f"--adapter: {plain(origin.path)} has no adapter; leave out --adapter"])
    rank = largest_rank(origin.adapter)
    done["commands"] = adapter_commands(target, done["to"], origin.model, rank)
    if done["to"] == "gguf":
        done["gguf"] = write_adapter(origin, target, type, dry_run=dry_run, progress=progress)
        if origin.trained_on_nf4:
            done["warnings"].append(TRAINED_ON_NF4)
        return
    done["warnings"] = adapter_warnings(origin.adapter, trained_on_nf4=origin.trained_on_nf4)
    if not dry_run:
        tmp = commit.make_tmp(target)
        for name in _ADAPTER_FILES:
            copy(origin.adapter / name, tmp / name, origin.adapter)
        commit.fsync_tree(tmp)
        tmp.rename(target)
        commit.fsync_dir(target.parent)


def ollama_files(origin: Origin, tell: Callable[[str], None] | None, source: str = ".") -> tuple[dict[str, str], bool]:
    """The Modelfile of a run, adapter or model, and whether the tokenizer is to add the first token of a prompt."""
    tokenizer = load_tokenizer(origin)
    report, template = trained_on(origin.path)
    form = prompt_form(report, template, has_chat_template=tokenizer.has_chat_template)
    for note in notes(tokenizer) if form == "chat" else ():
        if tell is not None:
            tell(note)
    config = {} if origin.model is None else tt_ckpt.read_config(origin.model)
    generation = generation_settings(origin.places)
    modelfile = ollama_modelfile(tokenizer, form=form, config=config, generation=generation, source=source)
    return {"Modelfile": modelfile}, adds_bos(tokenizer, form)


def say_first_token(folder: Path, added: bool) -> None:
    """Have tokenizer_config.json say whether the tokenizer adds the first token, as the Modelfile beside it reckons.

    Ollama's converter reads it there. If it is absent, the converter assumes no, its engine yes.
    """
    tokenizer, file = tt_data.load_tokenizer(folder), folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    if tokenizer.bos_id is not None and settings.get("add_bos_token") is not added:
        text = json.dumps({**settings, "add_bos_token": added}, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
