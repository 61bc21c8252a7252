"""Checks of a tokenizer.json before the library reads it, and whether everything in it is known to be harmless."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tt_data.files import json_kind
from tt_data.text.patterns import KNOWN_PATTERNS

MAX_ID = (1 << 24) - 1  # of a token: the largest vocabularies have a quarter of a million
_MAX_TOKEN = 4096  # characters
_MAX_ADDED, _MAX_ADDED_TOKEN, _MAX_ADDED_CHARACTERS = 1 << 16, 256, 1_000_000
_log = logging.getLogger(__name__)
_LARGEST = sys.float_info.max  # of a score: NaN and infinity are not below it
_MAX_WORD = 1000  # characters of a word that WordPiece splits, in a time that grows with their square
_HARMLESS = frozenset((
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "ByteLevel", "Metaspace", "Digits",
    "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation", "UnicodeScripts", "ByteFallback", "Fuse",
    "BPEDecoder",
))  # fmt: skip
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def check_tokenizer(data: Mapping[str, Any], name: str) -> bool:
    """Whether everything in a tokenizer.json is known to be harmless: if not, it must be tried out before it is used.
    Raises ValueError that names the file and the key."""
    try:
        _check_added(data.get("added_tokens", []))
        plain = _check_model(data.get("model"))
    except _WrongError as wrong:
        raise ValueError(f"{name}: {wrong}; correct the file, or download it again") from None
    try:
        return plain and all(_is_harmless(data.get(part), part) for part in _PARTS)
    except RecursionError:
        return False


class _WrongError(Exception):
    """Which key, what was found, what was expected."""


def _expect(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        what = json_kind(found) if isinstance(found, (dict, list)) else ascii(found)[:60]
        raise _WrongError(f"{key}: expected {expected}, found {what}")


def _check_added(tokens: Any) -> None:
    _expect(isinstance(tokens, list), "added_tokens", "a list", tokens)
    _expect(len(tokens) <= _MAX_ADDED, "added_tokens", f"at most {_MAX_ADDED:,} tokens", len(tokens))
    ids: dict[str, int] = {}
    for place, token in enumerate(tokens):
        key = f"added_tokens[{place}]"
        _expect(isinstance(token, dict), key, "an object with id and content", token)
        index, content = token.get("id"), token.get("content")
        _expect(_is_id(index), f"{key}.id", f"a whole number from 0 to {MAX_ID:,}", index)
        short = isinstance(content, str) and len(content) <= _MAX_ADDED_TOKEN
        _expect(short, f"{key}.content", f"a text of at most {_MAX_ADDED_TOKEN} characters", content)
        _expect(
            ids.setdefault(content, index) == index, f"{key}.id", f"{ids[content]} as before for {content!a}", index
        )
    total = sum(map(len, ids))
    _expect(total <= _MAX_ADDED_CHARACTERS, "added_tokens", f"{_MAX_ADDED_CHARACTERS:,} characters in all", total)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ID


def _are_ids(values: Collection[Any]) -> bool:
    """Whether all are ids: a quarter of a million values, in a few milliseconds."""
    return not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_ID)


def _check_model(model: Any) -> bool:
    _expect(isinstance(model, dict), "model", "an object with type and vocab", model)
    kind, vocab, unknown = model.get("type"), model.get("vocab"), model.get("unk_token")
    for key, value in model.items():
        short = not isinstance(value, str) or len(value) <= _MAX_TOKEN
        _expect(short, f"model.{key[:40]}", "a short text", value)
    if kind == "Unigram":
        _check_pieces(vocab)
        return model.get("unk_id") is not None  # else it must know all characters
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        return False  # an old file without a type, or one that the library will refuse
    _expect(isinstance(vocab, dict), "model.vocab", "an object of tokens and ids", vocab)
    if not _are_ids(vocab.values()):
        wrong = next(token for token, index in vocab.items() if not _is_id(index))
        _expect(False, f"model.vocab[{wrong[:40]!a}]", f"a whole number from 0 to {MAX_ID:,}", vocab[wrong])
    _check_lengths(vocab)
    if kind != "BPE":
        _expect(isinstance(unknown, str) and unknown in vocab, "model.unk_token", "a token of the vocabulary", unknown)
    dropout = model.get("dropout")
    _expect(not dropout, "model.dropout", "null (the same text must give the same ids)", dropout)
    longest = model.get("max_input_chars_per_word", 0)
    few = type(longest) is int and 0 <= longest <= _MAX_WORD
    _expect(few, "model.max_input_chars_per_word", f"at most {_MAX_WORD}", longest)
    return kind != "BPE" or not model.get("continuing_subword_prefix")


def _check_pieces(vocab: Any) -> None:
    _expect(isinstance(vocab, list), "model.vocab", "a list of tokens with their scores", vocab)
    _expect(len(vocab) <= MAX_ID, "model.vocab", f"at most {MAX_ID:,} tokens", len(vocab))
    for place, entry in enumerate(vocab):
        if not _is_piece(entry):
            _expect(False, f"model.vocab[{place}]", "a token and its score, a finite number", entry)
    _check_lengths([entry[0] for entry in vocab])


def _is_piece(entry: object) -> bool:
    if type(entry) is not list or len(entry) != 2:
        return False
    token, score = entry
    return type(token) is str and (type(score) is float or type(score) is int) and -_LARGEST <= score <= _LARGEST


def _check_lengths(tokens: Any) -> None:
    if max(map(len, tokens), default=0) > _MAX_TOKEN:
        longest = max(tokens, key=len)
        expected = f"tokens of at most {_MAX_TOKEN} characters"
        _expect(False, f"model.vocab[{longest[:20]!a}...]", expected, len(longest))


def _is_harmless(step: Any, part: str) -> bool:
    """Whether a step of the pipeline cannot fail, and its time grows with the length of the text and nothing else."""
    if step is None:
        return True
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        steps = step.get(_PARTS[part])
        return isinstance(steps, list) and len(steps) <= 32 and all(_is_harmless(each, part) for each in steps)
    if kind in ("Replace", "Split"):
        pattern = step.get("pattern")
        if not isinstance(pattern, dict) or len(pattern) != 1:
            return False
        text, content = pattern.get("String"), step.get("content", "")
        regex = pattern.get("Regex")
        if kind == "Split" and isinstance(regex, str) and regex in KNOWN_PATTERNS:
            return True
        return isinstance(text, str) and isinstance(content, str) and 0 < len(text) >= len(content)
    if kind == "Prepend":
        return len(str(step.get("prepend"))) <= 8
    if kind == "Strip":
        return part == "normalizer" or (step.get("start") in (0, 1) and step.get("stop") == 0)
    return isinstance(kind, str) and kind in _HARMLESS


def regex_letters(data: Mapping[str, Any]) -> str:
    """The characters that occur in the regular expressions of a tokenizer.json: long runs of them are tried out."""
    found: set[str] = set()
    left: list[Any] = [data.get(part) for part in _PARTS]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            regex = str(value.get("Regex", ""))[:_MAX_TOKEN]
            escapes = [int(digits, 16) for digits in re.findall(r"\\[xu]\{?([0-9A-Fa-f]{2,6})", regex)]
            found |= {*regex, *(chr(code) for code in escapes if code < 0xD800)}
            left += value.values()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            left += value[:64]
    return "".join(sorted(letter for letter in found if letter.isprintable() and letter not in "()[]{}|\\"))[:48]


def first_token(processor: Any) -> int | None:
    """The id that a post_processor puts before every text (bos); None if there is none."""
    if not isinstance(processor, dict):
        return None
    kind = processor.get("type")
    try:
        if kind == "Sequence":
            found = (first_token(each) for each in processor["processors"])
            return next((index for index in found if index is not None), None)
        if kind == "TemplateProcessing":
            name = processor["single"][0]["SpecialToken"]["id"]
            index = processor["special_tokens"][name]["ids"][0]
        elif kind in ("BertProcessing", "RobertaProcessing"):
            index = processor["cls"][1]
        else:
            return None
    except (LookupError, TypeError):  # there is no first token, or the processor is broken
        return None
    return index if _is_id(index) else None


def warn_of_other_ids(tokens: Sequence[dict[str, Any]], added: dict[int, Any], name: str) -> None:
    """Warn about ids: a token that is not in the model's vocabulary gets the next free one, whatever the file says."""
    found = {token.content: index for index, token in added.items()}
    for token in tokens:
        if found.get(token["content"], token["id"]) != token["id"]:
            _log.warning(
                "%s: the added token %a has id %d in the file, but the library gives it %d, which is used here",
                name, token["content"], token["id"], found[token["content"]],
            )  # fmt: skip
            return
