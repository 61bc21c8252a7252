"""A tokenizer from a model directory or a tokenizer file, and which chat template it gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tt_data.files import decode_text, json_kind, read_bytes, read_object, similar_file
from tt_data.template.prompts import INSTRUCT_TEMPLATES, our_name
from tt_data.template.sources import find_templates, named_template
from tt_data.text.backend import Backend
from tt_data.text.json_checks import MAX_ID
from tt_data.text.json_file import MAX_BYTES, JsonTokenizer
from tt_data.text.sentencepiece_file import SentencePieceTokenizer
from tt_data.text.tokenizer import Tokenizer

SpecialTokensInText = Literal["text", "tokens"]  # what special tokens that are typed in data become
_log = logging.getLogger(__name__)
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_MOST_EOS, _MOST_KEYS = 1000, 10_000
_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")


def load_tokenizer(
    path: str | Path | Sequence[str | Path], *, template: str | None = None, text_specials: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer of a model directory, or of one ``tokenizer.json`` or ``tokenizer.model`` file.

    Of several paths, nearest first (an adapter's folder, then its base): the tokenizer, the chat template and the
    tokens that end a turn (generation_config.json) are each taken from the first that has them.
    ``template``: a built-in chat template's name or a ``.jinja`` file instead of the model's own. ``text_specials``:
    control tokens that become their id also in data. Raises FileNotFoundError or ValueError.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(place) for place in path]
    directory, file = find_tokenizer(paths)
    config = read_object(directory / "tokenizer_config.json")
    if "auto_map" in config:
        _log.warning(
            "%s: auto_map is ignored, code of a model directory never runs", directory / "tokenizer_config.json"
        )
    folders = [place if place.is_dir() else place.parent for place in paths]
    root = None if file in paths else directory  # a file that the user names may be a link
    tokenizer = _build(file, root, directory, config, folders, text_specials)
    if template is not None:
        return tokenizer.with_template(*named_template(template, tokenizer.token_id))
    return tokenizer


def choose_template(
    tokenizer: Tokenizer, template: str | None, *, special_tokens: SpecialTokensInText = "text"
) -> Tokenizer:
    """``tokenizer`` with the chat template of that name (or ``.jinja`` file); None keeps its own. Tokenizers with the
    same template share the process that renders it.

    An instruct template changes rows, not the tokenizer. ``special_tokens="tokens"``: special tokens that are typed in
    data become those tokens. Raises ValueError with the nearest name, or FileNotFoundError.
    """
    if template is not None and our_name(template) not in INSTRUCT_TEMPLATES:
        try:
            tokenizer = tokenizer.with_template(*named_template(template, tokenizer.token_id))
        except ValueError as error:
            all_names = f", {', '.join(INSTRUCT_TEMPLATES)} or a .jinja"
            raise ValueError(str(error).replace(" or a .jinja", all_names)) from None
    return tokenizer.with_special_tokens_in_text() if special_tokens == "tokens" else tokenizer


def find_tokenizer(paths: Sequence[Path]) -> tuple[Path, Path]:
    """The folder and tokenizer file of the first path that has one. If none has, FileNotFoundError names the last."""
    for place in paths:
        files = [place / name for name in _FILES] if place.is_dir() else [place]
        found = next((file for file in files if os.path.lexists(file)), None)
        if found is not None:
            return (place if place.is_dir() else place.parent), found
    last = paths[-1]
    if not last.is_dir():
        raise FileNotFoundError(
            f"{last}: no such tokenizer file or model directory (looked in {Path.cwd()}){similar_file(last)}"
        )
    present = sorted(p.name for p in last.iterdir())[:8]
    raise FileNotFoundError(
        f"{last}: no tokenizer, expected tokenizer.json or tokenizer.model, found {', '.join(present) or 'nothing'}"
    )


def _build(
    file: Path, root: Path | None, directory: Path, config: Mapping[str, Any], folders: Sequence[Path],
    text_specials: Sequence[str],
) -> Tokenizer:  # fmt: skip
    names = _token_names(directory, config)
    name = str(file)
    data = read_bytes(file.resolve() if root is None else file, root, limit=MAX_BYTES)
    if not data:
        raise ValueError(f"{name}: 0 bytes, expected a tokenizer; download the file again")
    backend: Backend
    if file.suffix == ".json" or data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        source = decode_text(data, file)
        del data  # tens of megabytes
        backend = JsonTokenizer(source, name=name)
        bos = names.get("bos_token")
        adds_bos = isinstance(bos, str) and backend.first is not None and backend.first == backend.token_id(bos)
    elif _is_tiktoken(data):
        from tt_data.text.tiktoken_file import read_tiktoken

        backend = read_tiktoken(data, name)
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **names}
        adds_bos = True
    else:
        backend = SentencePieceTokenizer(
            data, added=_added_tokens(directory, config), name=name,
            prefix_once=bool(config) and not _flag(directory, config, "legacy"),
        )  # fmt: skip
        names = {**backend.special_names(), **names}
        adds_bos = _flag(directory, config, "add_bos_token", default=True)
    for key in ("bos_token", "eos_token"):
        if (token := names.get(key)) is not None and backend.token_id(token) is None:
            _log.warning("%s: %s %s is not in the vocabulary: no row gets it", file, key, ascii(token)[:60])
    templates, origin = find_templates(folders)
    return Tokenizer(
        backend, names=names, adds_bos=adds_bos, templates=templates, template_name=origin,
        extra_eos_ids=_generation_eos(folders), text_specials=text_specials,
        more_specials=_more_specials(directory, config),
    )  # fmt: skip


def _is_tiktoken(data: bytes) -> bool:
    """A line of base64, a space, a number: Llama 3's own tokenizer.model."""
    first = data[:1024].partition(b"\n")[0].split()
    return len(first) == 2 and first[1].isdigit()


def _wrong(file: Path, key: str, expected: str, found: object) -> ValueError:
    what = json_kind(found) if isinstance(found, (dict, list)) else ascii(found)[:60]
    return ValueError(f"{file}: {key}: expected {expected}, found {what}; correct the file, or download it again")


def _flag(directory: Path, config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(directory / "tokenizer_config.json", key, "true or false", value)
    return default if value is None else value


def _token_names(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token, ... as strings; tokenizer_config.json counts more than special_tokens_map.json."""
    names: dict[str, Any] = {}
    for file, source in _special_sources(directory, config):
        extra = source.get("extra_special_tokens")
        if len(source) > _MOST_KEYS or len(extra if isinstance(extra, Mapping) else ()) > _MOST_KEYS:
            raise _wrong(file, "its keys", f"at most {_MOST_KEYS:,}", len(source))
        for key, value in {**(extra if isinstance(extra, Mapping) else {}), **source}.items():
            content = _content_of(value)
            if key.endswith("_token") and content is not None:
                names[key] = content
            elif key in _NAMED and value is not None:
                raise _wrong(file, key, "a text, an object with content, or null", value)
    return names


def _special_sources(directory: Path, config: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
    """The files that name special tokens; the last one counts most."""
    older = directory / "special_tokens_map.json"
    return [(older, read_object(older)), (directory / "tokenizer_config.json", config)]


def _more_specials(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """The tokens without a name that the files call special, among them those that a user added."""
    found: list[str] = []
    for file, source in _special_sources(directory, config):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key) or []
            if not isinstance(values, list):
                if key == "additional_special_tokens" or not isinstance(values, Mapping):
                    raise _wrong(file, key, "a list of tokens", values)
                continue
            for place, value in enumerate(values):
                if (text := _content_of(value)) is None:
                    raise _wrong(file, f"{key}[{place}]", "a text, or an object with content", value)
                found.append(text)
    return found


def _content_of(token: Any) -> str | None:
    """The string of a token, which may be an object with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that are not in the sentencepiece model, with their ids."""
    file = directory / "added_tokens.json"
    added: dict[str, int] = {}
    for token, index in read_object(file).items():
        if type(index) is not int or not 0 <= index <= MAX_ID:
            raise _wrong(file, ascii(token)[:60], f"a whole number from 0 to {MAX_ID:,}", index)
        added[token] = index
    file, key = directory / "tokenizer_config.json", "added_tokens_decoder"
    decoder = config.get(key) or {}
    if not isinstance(decoder, dict):
        raise _wrong(file, key, "an object of ids and tokens", decoder)
    for digits, token in decoder.items():
        content = _content_of(token)
        if not (digits.isascii() and digits.isdigit() and len(digits) < 12 and int(digits) <= MAX_ID):
            raise _wrong(file, key, f"ids from 0 to {MAX_ID:,}", digits)
        if content is None:
            raise _wrong(file, f"{key}.{digits}", "a text, or an object with content", token)
        added[content] = int(digits)
    return added


def _generation_eos(folders: Sequence[Path]) -> tuple[int, ...]:
    """The ids that end a text, from the nearest file that states any."""
    for file in (folder / name for folder in folders for name in ("generation_config.json", "config.json")):
        stated = read_object(file).get("eos_token_id")
        if stated is not None:
            values = stated if isinstance(stated, list) else [stated]
            wrong = [value for value in values if type(value) is not int]
            if wrong or len(values) > _MOST_EOS:
                found = wrong[0] if wrong else values
                raise _wrong(file, "eos_token_id", "a whole number, or a short list of them", found)
            return tuple(value for value in values if value >= 0)  # some files write -1 for none
    return ()
