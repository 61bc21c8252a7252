"""The word cache against the library: the same ids and the same spans, for the splitting patterns of known models."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from tt_data.template.spans import MarkedText
from tt_data.text.json_file import JsonTokenizer, make_word_cache
from tt_data.text.patterns import to_ascii_pattern

PATTERNS = {
    "gpt2": None,
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
PIECES = (
    "the", "cat", "CAT", "Sat", " ", "  ",
    "   ", "\n", "\n\n", "\r\n", "\t", ".", "...", "!?", "'s", "'S", "'re", "'t", "'x",
    "1", "12", "345", "6789", "a", "Z", "<", "|", ">", "_", "(x)", "/", "//", "<e>", "<|im_end|>", "-", "\\p", "\x0b",
    "\x0c", "\x1c", "\x00", "\x7f",
)  # fmt: skip


def library(pattern: str | None, corpus: list[str]) -> Tokenizer:
    from tokenizers import decoders, models, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<e>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 16))) for _ in range(count)]


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_and_spans_equal_the_library(name: str) -> None:
    tokenizer = library(PATTERNS[name], texts(300, seed=1))
    cached, plain = JsonTokenizer(tokenizer.to_str()), JsonTokenizer(tokenizer.to_str())
    assert cached._words is not None
    plain._words = None
    rng = random.Random(2)
    rows = []
    for text in texts(3000, seed=3):
        cuts = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, rng.choice([0, 2, 4]))))
        rows.append(MarkedText(text, list(zip(cuts[::2], cuts[1::2], strict=False))))
    used = 0
    for row, one, other in zip(rows, cached.encode_batch(rows), plain.encode_batch(rows), strict=True):
        assert one == other, row
        assert one.ids == tokenizer.encode(row.text, add_special_tokens=False).ids
        used += cached._words.encode(row.text, row.trained) is not None
    assert used > 1000


def test_control_characters_and_other_letters_go_to_the_library() -> None:
    cache = JsonTokenizer(library(None, texts(50, seed=1)).to_str())._words
    assert cache is not None
    for text in ("caf\u00e9", "a\x1cb", "a\x00", "a\x0bb", "\u2028"):
        assert cache.encode(text, []) is None


def variants() -> dict[str, Any]:
    data = json.loads(library(None, texts(50, seed=1)).to_str())
    prefix = {**data, "pre_tokenizer": {**data["pre_tokenizer"], "add_prefix_space": True}}
    stripped = json.loads(json.dumps(data))
    stripped["added_tokens"][0]["lstrip"] = True
    digits = [{"type": "Digits", "individual_digits": True}, data["pre_tokenizer"]]
    return {
        "a prefix space": prefix,
        "a token that strips": stripped,
        "lower case": {**data, "normalizer": {"type": "Lowercase"}},
        "two splitters": {**data, "pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}},
        "no splitter": {**data, "pre_tokenizer": None},
        "dropout": {**data, "model": {**data["model"], "dropout": 0.1}},
        "byte fallback": {**data, "model": {**data["model"], "byte_fallback": True}},
    }


@pytest.mark.parametrize("name", variants())
def test_other_tokenizers_have_no_cache(name: str) -> None:
    data = variants()[name]
    assert make_word_cache(Tokenizer.from_str(json.dumps(data)), data) is None


@pytest.mark.parametrize(
    "pattern", [r"\p{Han}+", r"\P{L}+", r"[a&&b]", r"(a)b", r"\p{Lt}", r"[[:alpha:]]", r"\h+", "("]
)
def test_patterns_that_may_mean_something_else_are_refused(pattern: str) -> None:
    assert to_ascii_pattern(pattern) is None


def test_the_cache_stops_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tt_data.text.json_file._MAX_WORDS", 5)
    tokenizer = JsonTokenizer(library(None, texts(50, seed=1)).to_str())
    assert tokenizer._words is not None
    for text in texts(100, seed=4):
        tokenizer.encode_batch([MarkedText(text)])
    assert len(tokenizer._words._words) == 5
