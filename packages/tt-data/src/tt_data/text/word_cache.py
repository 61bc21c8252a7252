"""ASCII text through a byte-level BPE, each distinct word once: several times faster than the library, the same ids.

Byte-level BPE splits text into words by a regular expression and merges within each word alone, so the ids of a word do
not depend on its place. Text that is not plain ASCII, and every other kind of tokenizer, goes to the library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

from tt_data.template.spans import Encoded, Span, join_spans

_MAX_WORDS = 200_000
_MAX_LETTERS = 100  # of a word that is kept: a longer one hardly comes twice
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NUMBERS = (r"\p{N}{1,3}", r"\p{N}")
_LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _OTHER = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\s\p{L}\p{N}]+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _LINES
)
# The splitting expressions of public models. Their time grows with the length of the text and nothing else; another one
# may backtrack, which Python's engine does not limit.
KNOWN_PATTERNS = frozenset(
    (
        _GPT2,
        *(f"{_SHORT}|{_WORD}|{n}| ?{_OTHER}[\\r\\n]*{_LINES}" for n in _NUMBERS),
        *(f"{_CASED % (s, s)}|{n}| ?{_OTHER}[\\r\\n/]*{_LINES}" for n in _NUMBERS for s in ("", f"{_SHORT}?")),
        _DEEPSEEK,
        _DEEPSEEK.replace(r"\r\n", "\r\n"),  # as its file has it
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        *(r"\p{N}", r"\p{N}{1,3}", r"\d", r"\d{1,3}", "[0-9]", "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+"),
    )
)
_CLASSES = {
    r"\p{L}": "a-zA-Z", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z", r"\p{Lt}": "", r"\p{Lm}": "", r"\p{Lo}": "",
    r"\p{N}": "0-9", r"\p{Nd}": "0-9", r"\p{M}": "",
}  # fmt: skip
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's letter for each byte: printable ones are themselves, the others follow from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}


class _Words(dict[str, tuple[int, ...]]):
    """The ids of words, made by the model when they are first asked for. ``lengths``: the characters of each id."""

    def __init__(self, model: Any, added: dict[str, int]) -> None:
        super().__init__({token: (index,) for token, index in added.items()})
        self.lengths = {index: len(token) for token, index in added.items()}
        self._model, self._letters = model, byte_letters()

    def __missing__(self, word: str) -> tuple[int, ...]:
        tokens = self._model.tokenize("".join(self._letters[ord(c)] for c in word))
        ids = tuple(token.id for token in tokens)
        self.lengths.update((token.id, len(token.value)) for token in tokens)
        if len(self) < _MAX_WORDS and len(word) <= _MAX_LETTERS:
            self[word] = ids
        return ids


class WordCache:
    """Encodes ASCII text. ``encode`` gives None for text that the library must encode."""

    def __init__(self, tokenizer: Any, pattern: re.Pattern[str], added: dict[str, int]) -> None:
        self._words = _Words(tokenizer.model, added)
        self._pattern = pattern
        ordered = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None

    def encode(self, text: str, spans: Sequence[Span]) -> Encoded | None:
        """Ids, and the tokens that contain a character of each span."""
        if not text.isascii() or _CONTROLS.search(text):
            return None
        pieces = self._split.split(text) if self._split else [text]
        words: list[str] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                words.append(piece)
                continue
            found = self._pattern.findall(piece)
            if sum(map(len, found)) != len(piece):
                return None
            words += found
        parts = list(map(self._words.__getitem__, words))
        ids = list(chain.from_iterable(parts))
        if not spans:
            return Encoded(ids)
        if spans == [(0, len(text))]:
            return Encoded(ids, [(0, len(ids))] if ids else [])
        return Encoded(ids, self._token_spans(words, parts, spans))

    def _token_spans(self, words: list[str], parts: list[tuple[int, ...]], spans: Sequence[Span]) -> list[Span]:
        """From characters to tokens: to the word first, then within it (a byte is a character here)."""
        ends = list(accumulate(map(len, words)))
        counts = list(accumulate(map(len, parts)))
        edges: list[int] = []  # the tokens of the first and the last character of each span
        word = 0
        for place in chain.from_iterable((start, end - 1) for start, end in spans if start < end):
            while ends[word] <= place:
                word += 1
            token, reached = counts[word] - len(parts[word]), ends[word] - len(words[word])
            for index in parts[word]:
                reached += self._words.lengths[index]
                if place < reached:
                    break
                token += 1
            edges.append(token)
        return join_spans([(first, last + 1) for first, last in zip(edges[::2], edges[1::2], strict=True)])


def make_word_cache(tokenizer: Any, data: dict[str, Any]) -> WordCache | None:
    """A cache for the tokenizer of a file with ``data``, if it is a byte-level BPE with a known pattern, else None."""
    model = data["model"]
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(key) for key in plain) or model.get("byte_fallback"):
        return None
    if not _is_identity(data.get("normalizer")):
        return None
    pattern = _splitting_pattern(data.get("pre_tokenizer"))
    flags = ("single_word", "lstrip", "rstrip")
    if pattern is None or any(token.get(flag) for token in data.get("added_tokens", ()) for flag in flags):
        return None
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    return WordCache(tokenizer, pattern, added)


def _is_identity(normalizer: Any) -> bool:
    """Whether ASCII text comes out unchanged."""
    return normalizer is None or normalizer.get("type") in ("NFC", "NFKC", "NFD", "NFKD")


def _splitting_pattern(pre_tokenizer: Any) -> re.Pattern[str] | None:
    """The expression that splits ASCII text into words; None if the file has another one, or more steps."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return to_ascii_pattern(_GPT2) if steps[0].get("use_regex", True) else None
    split = steps[0]
    is_plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) != 2 or not is_plain or steps[1].get("use_regex", True) or "Regex" not in split["pattern"]:
        return None
    known = split["pattern"]["Regex"]
    return to_ascii_pattern(known) if known in KNOWN_PATTERNS else None


def to_ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """A pattern that matches in ASCII what ``pattern`` (with Unicode classes) does; None if that is not certain."""
    written: list[str] = []
    inside = False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith("\\p"):
            letters = _CLASSES.get(part)
            if letters is None or not (inside or letters):
                return None
            written.append(letters if inside else f"[{letters}]")
            continue
        if (part == "[" and inside) or part in ("\\P", "\\h", "\\R", "\\X", "&"):
            return None
        inside = part == "[" or (inside and part != "]")
        written.append(part)
    try:
        compiled = re.compile("".join(written), re.ASCII)
    except re.error:
        return None
    return None if compiled.groups else compiled
