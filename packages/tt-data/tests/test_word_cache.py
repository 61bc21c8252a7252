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


ODD_PIECES = (
    "caf\u00e9", "\u2019s", "\u2019", "\u4e2d\u6587", "e\u0301", "\u0301", " \u0301", "\u00a0", "\u2028", "\U0001f600",
    "\ufb01", "\u017f", "\u0661", "\u00b2", "\u200b", "\x0b", "\x1c", "\x00",
)  # fmt: skip


@pytest.mark.parametrize("normalizer", [None, "NFC", "NFKC", "NFD"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_few_other_letters_are_encoded_with_their_word_alone_and_equal_the_library(
    name: str, normalizer: str | None
) -> None:
    data = json.loads(library(PATTERNS[name], texts(300, seed=1)).to_str())
    data["normalizer"] = normalizer and {"type": normalizer}
    tokenizer = JsonTokenizer(json.dumps(data))
    assert tokenizer._words is not None
    rng = random.Random(5)
    used = 0
    for _ in range(150):
        pieces = rng.choices(PIECES, k=rng.randint(8, 40))
        for _ in range(rng.randint(1, 2)):
            pieces.insert(rng.randint(0, len(pieces)), rng.choice(ODD_PIECES))
        text = "".join(pieces)
        cuts = sorted(rng.sample(range(len(text) + 1), rng.choice([2, 4])))
        row = MarkedText(text, list(zip(cuts[::2], cuts[1::2], strict=True)))
        found = tokenizer._words.encode(row.text, row.trained)
        used += found is not None
        cache, tokenizer._words = tokenizer._words, None
        (expected,) = tokenizer.encode_batch([row])
        tokenizer._words = cache
        assert found in (None, expected), row
    assert used > 75


def test_text_of_other_letters_goes_to_the_library() -> None:
    cache = JsonTokenizer(library(None, texts(50, seed=1)).to_str())._words
    assert cache is not None
    for text in ("\u4e2d\u6587\u4e2d\u6587 a b", "a\x00", "\u2028"):
        assert cache.encode(text, []) is None


def test_text_is_not_cut_in_a_token_that_contains_a_space() -> None:
    data = json.loads(library(None, texts(50, seed=1)).to_str())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 449, "content": "the cat", "normalized": True})
    data["normalizer"] = {"type": "NFKC"}
    tokenizer = JsonTokenizer(json.dumps(data))
    assert tokenizer._words is not None
    assert tokenizer._words.encode("a long text with the\u00a0cat in it", []) is None


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
