"""Llama 3's own ``tokenizer.model``: a line of base64 bytes and a rank for each token (tiktoken's format)."""

from __future__ import annotations

import base64
import json
from itertools import pairwise

from tt_data.text.json_file import JsonTokenizer
from tt_data.text.patterns import byte_letters

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MOST_LINES, _LONGEST = 1_000_000, 1024  # tokens; bytes of one
_NUM_SPECIAL = 256
_SPECIAL = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 5: "<|step_id|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip


def read_tiktoken(data: bytes, name: str) -> JsonTokenizer:
    """The tokenizer of a tiktoken file, with Llama 3's 256 special tokens behind its ranks. Raises ValueError."""
    ranks = _read_ranks(data, name)
    try:
        tokenizer = _as_tokenizer_json(ranks)
    except _UnmadeError as error:
        raise ValueError(f"{name}: {error}; download the file again") from None
    return JsonTokenizer(json.dumps(tokenizer), name=name)


class _UnmadeError(Exception):
    """No merges give a token."""


def _read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    if len(lines) > _MOST_LINES:
        raise ValueError(f"{name}: {len(lines):,} lines, expected at most {_MOST_LINES:,}; download the file again")
    for number, line in enumerate(lines, 1):
        try:
            spelt, digits = line.split()
            token, rank = base64.b64decode(spelt, validate=True), int(digits) if digits.isdigit() else -1
        except ValueError:
            token, rank = b"", -1
        if not 0 <= rank < len(lines) or not 0 < len(token) <= _LONGEST:
            expected = f"base64 bytes (1 to {_LONGEST}) and a rank from 0 to {len(lines) - 1}"
            raise ValueError(f"{name}:{number}: expected {expected}, found {line[:40]!r}; download the file again")
        if token in ranks:
            raise ValueError(f"{name}:{number}: {token!r} a second time; download the file again")
        ranks[token] = rank
    if len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{name}: the ranks are not 0 to {len(ranks) - 1}, each once; download the file again")
    lacking = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if lacking is not None:
        raise ValueError(f"{name}: no rank for the byte 0x{lacking:02x}, expected all 256; download the file again")
    return ranks


def _as_tokenizer_json(ranks: dict[bytes, int]) -> dict[str, object]:
    """The same merges as a byte-level BPE: each token is merged from the two parts that its last merge joins."""
    letters = byte_letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append([spelt[left], spelt[right]])
    names = {i: _SPECIAL.get(i, f"<|reserved_special_token_{i}|>") for i in range(_NUM_SPECIAL)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": len(ranks) + i, "content": name, **flags} for i, name in names.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "ignore_merges": True, "merges": merges,
            "vocab": {spelt[token]: rank for token, rank in ranks.items()},
        },
    }  # fmt: skip


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of ``token`` that are left after all merges of a lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs)
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise _UnmadeError(f"the token {token!r} cannot be made by merging two lower ones")
    return parts[0], parts[1]
