"""A tokenizer from a model directory or a tokenizer file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tt_data.backend import Backend
from tt_data.builtin_templates import with_named_template
from tt_data.chat_template import find_chat_template
from tt_data.sentencepiece_model import read_sentencepiece
from tt_data.tokenizer import Tokenizer
from tt_data.tokenizer_json import JsonTokenizer, read_tokenizer_json

_log = logging.getLogger(__name__)
_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")


def load_tokenizer(
    path: str | Path | Sequence[str | Path], *, template: str | None = None, text_specials: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer of a model directory, or of one ``tokenizer.json`` or ``tokenizer.model`` file.

    Of several paths, nearest first (an adapter's folder, then its base): the tokenizer, the chat template and the
    tokens that end a turn (generation_config.json) are each taken from the first that has them.
    ``template``: a built-in chat template's name or a ``.jinja`` file instead of the model's own. ``text_specials``:
    control tokens that become their id also where they stand in data. Raises FileNotFoundError or ValueError.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(place) for place in path]
    directory, file = find_tokenizer(paths)
    config = _read_json(directory / "tokenizer_config.json")
    if "auto_map" in config:
        _log.warning(
            "%s: auto_map is ignored, code of a model directory never runs", directory / "tokenizer_config.json"
        )
    folders = [place if place.is_dir() else place.parent for place in paths]
    tokenizer = _build(file, directory, config, folders, text_specials)
    if template is not None:
        return with_named_template(tokenizer, template)
    return tokenizer


def find_tokenizer(paths: Sequence[Path]) -> tuple[Path, Path]:
    """Folder and tokenizer file of the first path that has one. FileNotFoundError for the last if none does."""
    for place in paths:
        files = [place / name for name in _FILES] if place.is_dir() else [place]
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            return (place if place.is_dir() else place.parent), found
    last = paths[-1]
    if not last.is_dir():
        raise FileNotFoundError(_missing(last))
    present = sorted(p.name for p in last.iterdir())[:8]
    raise FileNotFoundError(
        f"{last}: no tokenizer, expected tokenizer.json or tokenizer.model, found {', '.join(present) or 'nothing'}"
    )


def _missing(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"{path}: no such tokenizer file or model directory (looked from {Path.cwd()}){hint}"


def _build(
    file: Path, directory: Path, config: Mapping[str, Any], folders: Sequence[Path], text_specials: Sequence[str]
) -> Tokenizer:
    names = _token_names(directory, config)
    backend: Backend
    if _is_json(file):
        backend = read_tokenizer_json(file)
        adds_bos = _adds_bos_json(backend, names, config)
    elif _is_tiktoken(file):
        from tt_data.tiktoken_file import read_tiktoken

        backend = read_tiktoken(file)
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **names}
        adds_bos = True
    else:
        backend = read_sentencepiece(
            file, added=_added_tokens(directory, config), prefix_once=bool(config) and not config.get("legacy")
        )
        names = {**_sentencepiece_names(backend), **names}
        adds_bos = bool(config.get("add_bos_token", True))
    templates, origin = find_templates(folders)
    return Tokenizer(
        backend, names=names, adds_bos=adds_bos, templates=templates, template_name=origin,
        extra_eos_ids=_generation_eos(folders), text_specials=text_specials,
        more_specials=_more_specials(directory, config),
    )  # fmt: skip


def _is_json(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(64).lstrip()[:1] == b"{"


def _is_tiktoken(file: Path) -> bool:
    """A line of base64, a space, a number: Llama 3's own tokenizer.model."""
    with file.open("rb") as stream:
        first = stream.readline(1024).split()
    return len(first) == 2 and first[1].isdigit()


def _adds_bos_json(backend: JsonTokenizer, names: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    bos = names.get("bos_token")
    index = backend.token_id(bos) if isinstance(bos, str) else None
    return bool(backend.by_default) and backend.by_default[0] == index


def _token_names(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token, ... as strings; what tokenizer_config.json says goes before special_tokens_map.json."""
    names: dict[str, Any] = {}
    for source in (_read_json(directory / "special_tokens_map.json"), config):
        extra = source.get("extra_special_tokens")
        for key, value in {**(extra if isinstance(extra, Mapping) else {}), **source}.items():
            content = _content_of(value)
            if key.endswith("_token") and content is not None:
                names[key] = content
    return names


def _more_specials(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """The tokens without a name of their own that the files call special, a user's own among them."""
    found: list[str] = []
    for source in (_read_json(directory / "special_tokens_map.json"), config):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key)
            if isinstance(values, list):
                found += [text for text in map(_content_of, values) if text is not None]
    return found


def _content_of(token: Any) -> str | None:
    """The string of a token, which may be an object with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _sentencepiece_names(backend: Any) -> dict[str, str]:
    ids: Mapping[str, int] = backend.special_ids()
    return {f"{name}_token": backend.token(index) for name, index in ids.items() if index >= 0}


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that the sentencepiece model does not hold, with their ids."""
    try:
        added = {token: int(index) for token, index in _read_json(directory / "added_tokens.json").items()}
        decoder = config.get("added_tokens_decoder", {})
        return added | {str(token["content"]): int(index) for index, token in decoder.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        where = f"{directory}: added_tokens.json or added_tokens_decoder in tokenizer_config.json"
        raise ValueError(f"{where}: expected tokens and whole numbers") from None


def find_templates(folders: Sequence[Path]) -> tuple[dict[str, str], str]:
    """The chat templates of the first folder that has any, and the file they came from."""
    found = (find_chat_template(folder, _read_json(folder / "tokenizer_config.json")) for folder in folders)
    return next((pair for pair in found if pair[0]), ({}, str(folders[-1] / "tokenizer_config.json")))


def _generation_eos(folders: Sequence[Path]) -> tuple[int, ...]:
    files = [folder / name for folder in folders for name in ("generation_config.json", "config.json")]
    stated = (_read_json(file).get("eos_token_id") for file in files)
    found = next((value for value in stated if value is not None), None)
    values = found if isinstance(found, list) else [found]
    return tuple(value for value in values if isinstance(value, int))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none. Raises ValueError with the place of a mistake."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); is it a git-lfs pointer or cut off?") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
