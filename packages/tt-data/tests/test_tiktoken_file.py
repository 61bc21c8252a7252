"""Llama 3's tiktoken file against the tiktoken library."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_tokenizer


def test_llama3_tiktoken_file_equals_tiktoken(tmp_path: Path, random_strings: Any) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from tt_data.text.tiktoken_file import _SPLIT

    ranks = {bytes([b]): b for b in range(256)}
    rng = random.Random(0)
    while len(ranks) < 700:  # merges of what is there already, as training makes them
        token = rng.choice(list(ranks)[-60:]) + rng.choice(list(ranks)[:128])
        ranks.setdefault(token, len(ranks))
    for word in (
        b"th",
        b"the",
        b" t",
        b" the",
        b"ca",
        b"cat",
        "\u00e9".encode(),
        "\u65e5".encode()[:2],
        "\u65e5".encode(),
    ):
        ranks.setdefault(word, len(ranks))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    reference = tiktoken.Encoding("x", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_tokenizer(path)
    for text in random_strings(500, seed=5):
        ids = tokenizer.encode(text, False, False)
        assert ids == reference.encode(text, disallowed_special=()), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(ranks) + 256
    assert tokenizer.bos_id == len(ranks)
    assert tokenizer.token_id("<|eot_id|>") == len(ranks) + 9
    assert tokenizer.adds_bos
    path.write_bytes(b"!!! 0\n")
    with pytest.raises(ValueError, match="tokenizer.model:1: "):
        load_tokenizer(path)
