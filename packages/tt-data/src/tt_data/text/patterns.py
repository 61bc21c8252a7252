"""The splitting expressions of public byte-level BPE tokenizers, and what they match in ASCII text.

A file apart from ``json_file``: checks of a tokenizer's file need the known expressions, too.
"""

from __future__ import annotations

import re
from typing import Any

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


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's letter for each byte: printable ones are themselves, the others follow from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}


def splitting_pattern(pre_tokenizer: Any) -> re.Pattern[str] | None:
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
