"""The files beside the weights, from which other programs know how to prompt a model as it was trained."""

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tt_data.template.prompts import INSTRUCT_TEMPLATES, our_name
from tt_data.template.sources import find_templates
from tt_data.text.load import find_tokenizer
from tt_train.run_files import TEMPLATE_FILE, read_json

_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken",
                    "*.model", "tekken.json")  # fmt: skip
_GENERATION = "generation_config.json"

Files = dict[str, str | Path | None]  # name -> text, a file or folder to copy, or None: leave out that of the base


def own_template(tokenizer: Any, template: str | None) -> str | None:
    """The Jinja text of ``data.template``; None if a run keeps the model's own or uses an instruct template.

    ``tokenizer``: from ``tt_data.choose_template``.
    """
    if template is None or our_name(template) in INSTRUCT_TEMPLATES:
        return None
    return str(tokenizer.templates["default"])


def serving_files(places: Sequence[Path], tokenizer: Any, template: str | None, source: Path | None) -> Files:
    """Files for ``tt_ckpt.save_hf(files=...)``: the nearest of each kind, in place of those of ``source``.

    ``template``: as in ``own_template``. generation_config.json lists every token that ends a turn, or a server would
    not stop at it. If the nearest one already does, it is copied unchanged.
    """
    folder, file = find_tokenizer(list(places))
    folders = [place if place.is_dir() else place.parent for place in places]
    files: Files = {}
    if folder != source:
        files |= _group(folder, source, _TOKENIZER_FILES)
        files[file.name] = file
    files |= _template_files(folders, folder, source, own_template(tokenizer, template))
    generation = generation_settings(places)
    nearest = next((place / _GENERATION for place in folders if (place / _GENERATION).is_file()), None)
    stated = generation.get("eos_token_id")
    if stated is None and source is not None and (source / "config.json").is_file():
        stated = read_json(source / "config.json").get("eos_token_id")
    known = stated if isinstance(stated, list) else [stated]
    if not set(tokenizer.eos_ids) <= set(known):
        generation["eos_token_id"] = list(tokenizer.eos_ids)
        files[_GENERATION] = _json(generation)
    elif nearest is not None and nearest.parent != source:
        files[_GENERATION] = nearest
    return files


def generation_settings(places: Sequence[Path]) -> dict[str, Any]:
    """The nearest generation_config.json; {} if there is none."""
    files = [(place if place.is_dir() else place.parent) / _GENERATION for place in places]
    return next((read_json(file) for file in files if file.is_file()), {})


def _template_files(folders: Sequence[Path], tokenizer: Path, source: Path | None, own: str | None) -> Files:
    """The files of the chat templates, unless they come with the tokenizer's files."""
    nearest = next((folder for folder in folders if find_templates([folder])[0]), None)
    if own is not None:
        return {**_group(None, source, _TEMPLATE_FILES), TEMPLATE_FILE: own}
    if nearest is None or nearest == tokenizer == source:
        return {}
    files = _group(nearest, source, _TEMPLATE_FILES)
    if nearest != tokenizer and not any(files.values()):  # in a tokenizer_config.json that is not copied
        chosen = find_templates([nearest])[0]
        config = tokenizer / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        settings["chat_template"] = [{"name": name, "template": text} for name, text in chosen.items()]
        files["tokenizer_config.json"] = _json(settings)
    return files


def _group(folder: Path | None, source: Path | None, patterns: Sequence[str]) -> Files:
    """Matching entries of ``folder``, and None for those that only ``source`` has: they would contradict them."""
    found = {entry.name: entry for entry in _matching(folder, patterns)}
    return {**dict.fromkeys(entry.name for entry in _matching(source, patterns)), **found}


def _matching(folder: Path | None, patterns: Sequence[str]) -> list[Path]:
    entries = sorted(folder.iterdir()) if folder is not None else []
    return [entry for entry in entries if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)]


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
