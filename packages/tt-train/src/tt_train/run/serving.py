"""The files beside the weights, from which other programs know how to prompt a model as it was trained."""

import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tt_data
from tt_ckpt.files import regular
from tt_data.template.prompts import INSTRUCT_TEMPLATES, our_name
from tt_data.template.sources import find_templates
from tt_data.text.load import find_tokenizer
from tt_train.records.run_files import TEMPLATE_FILE, read_json

_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken",
                    "*.model", "tekken.json")  # fmt: skip
_GENERATION = "generation_config.json"
_KINDS = (*_TOKENIZER_FILES, *_TEMPLATE_FILES, _GENERATION)

Files = dict[str, str | Path | None]  # name -> text, a file or folder to copy, or None: leave out that of the base


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a merged model needs of its tokenizer: files beside the weights, and the ids for its config."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    files: Files


def serving_of(
    places: Sequence[Path], tokenizer: tt_data.Tokenizer, template: str | None, source: Path | None
) -> Serving:
    """``places``, ``template``, ``source``: as in ``serving_files``."""
    files = serving_files(places, tokenizer, template, source)
    return Serving(vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, files=files)


def to_record(serving: Serving, places: Sequence[Path]) -> dict[str, Any] | None:
    """``serving`` for the manifest of a run, so that a merge neither loads the tokenizer nor renders its template.

    None if files are to be copied from elsewhere than the base, whose own files need no record.
    """
    digest = _digest(places)
    copies = any(isinstance(content, Path) for content in serving.files.values())
    return None if copies or not digest else {"digest": digest, **vars(serving)}


def from_record(record: Mapping[str, Any], places: Sequence[Path]) -> Serving | None:
    """What ``to_record`` kept; None if it kept nothing, or if a file in ``places`` has changed since."""
    if record.keys() != {"digest", "vocab_size", "bos_id", "eos_id", "files"}:
        return None
    if not record["digest"] or record["vocab_size"] is None or record["files"] is None:
        return None
    for name, content in record["files"].items():
        is_known = any(fnmatch.fnmatchcase(name, kind) for kind in _KINDS)
        if not is_known or not isinstance(content, str | None):
            return None
    if record["digest"] != _digest(places):
        return None
    return Serving(**{key: value for key, value in record.items() if key != "digest"})


def _digest(places: Sequence[Path]) -> str:
    """Of the names and bytes of all that a tokenizer and ``serving_files`` are made of; empty if a file is refused."""
    digest = hashlib.sha256(tt_data.__version__.encode())
    for place in places:
        folder = place if place.is_dir() else place.parent
        files = [*_matching(folder, (*_KINDS, "config.json")), *sorted(folder.glob("additional_chat_templates/*"))]
        for file in dict.fromkeys([*files, folder / "original" / "tokenizer.model", place]):
            if not os.path.lexists(file) or file.is_dir():
                continue
            try:
                with regular(file, folder).open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            except (OSError, ValueError):
                return ""
            digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


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
    nearest = generation_file(places)
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
    file = generation_file(places)
    return {} if file is None else read_json(file)


def generation_file(places: Sequence[Path]) -> Path | None:
    """The nearest generation_config.json, if there is one."""
    files = [(place if place.is_dir() else place.parent) / _GENERATION for place in places]
    return next((file for file in files if file.is_file()), None)


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
