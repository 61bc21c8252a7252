"""A trained model as another program reads it, and the commands to run it there."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch

import tt_ckpt
import tt_data
from tt_train.errors import ConfigError, did_you_mean, shell_word
from tt_train.models.merge import merge_run, refuse_full
from tt_train.models.modelfile import notes, ollama_modelfile
from tt_train.models.ollama import adds_bos, go_template
from tt_train.models.origin import Base, Origin, find_origin, load_tokenizer
from tt_train.models.prompt_form import prompt_form, trained_on
from tt_train.records.run_files import read_json
from tt_train.run.serving import generation_settings

__all__ = ["FORMATS", "commands", "export", "go_template", "ollama_modelfile"]

FORMATS = ("hf", "ollama")


class Exported(TypedDict):
    """``commands``: what to type to run the model of the folder ``path`` elsewhere."""

    path: str
    to: str
    dry_run: bool
    commands: list[str]


def export(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "hf",
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    base: Base = None,
    tell: Callable[[str], None] | None = None,
) -> Exported:
    """Write the model of a run, adapter or directory to ``output``, with adapters merged, and return how to run it.

    ``to``: ``hf`` is a Hugging Face directory, which vLLM, SGLang and llama.cpp's converter read; ``ollama`` adds a
    Modelfile whose template renders as the model's own. ``base``: as in ``load``. ``tell`` receives sentences on what
    merging cost in precision and on what a Modelfile cannot express.

    Raises:
        ConfigError: unknown format; ``output`` is not empty; a template that no Modelfile can express.
    """
    if to not in FORMATS:
        raise ConfigError([f"--to: unknown format {to!r}{did_you_mean(to, FORMATS)}; known: {', '.join(FORMATS)}"])
    target = Path(output)
    refuse_full(target)
    origin = find_origin(path, base)
    files, first = ollama_files(origin, tell) if to == "ollama" else ({}, None)
    merge_run(path, target, dtype=dtype, base=base, files=files, dry_run=dry_run, tell=tell)
    if first is not None and not dry_run:
        say_first_token(target, first)
    return {"path": str(target), "to": to, "dry_run": dry_run, "commands": commands(target, to)}


def ollama_files(origin: Origin, tell: Callable[[str], None] | None) -> tuple[dict[str, str], bool]:
    """The Modelfile of a run, adapter or model, and whether the tokenizer is to add the first token of a prompt."""
    tokenizer = load_tokenizer(origin)
    report, template = trained_on(origin.path)
    form = prompt_form(report, template, has_chat_template=tokenizer.has_chat_template)
    for note in notes(tokenizer) if form == "chat" else ():
        if tell is not None:
            tell(note)
    config = {} if origin.model is None else tt_ckpt.read_config(origin.model)
    generation = generation_settings(origin.places)
    modelfile = ollama_modelfile(tokenizer, form=form, config=config, generation=generation)
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


def commands(folder: Path, to: str) -> list[str]:
    """What to type to run the exported model elsewhere."""
    path, gguf = shell_word(folder), shell_word(f"{folder}.gguf")
    if to == "ollama":
        name = re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII).strip("-.") or "model"
        return [f"ollama create {name} -f {shell_word(folder / 'Modelfile')}", f"ollama run {name}"]
    return [
        f"vllm serve {path}",
        f"python convert_hf_to_gguf.py {path} --outfile {gguf} --outtype bf16",
        f"llama-cli -m {gguf}",
    ]
