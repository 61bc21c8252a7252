"""A sentencepiece file against the sentencepiece library, and against transformers where templates are at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tt_data import Message, load_tokenizer
from tt_data.template.spans import MarkedText


def test_sentencepiece_equals_the_library(sentencepiece_file: Path, random_strings: Any) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = load_tokenizer(sentencepiece_file)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.vocab_size == reference.get_piece_size()
    for text in random_strings(500, seed=4, extra=["</s>", "<s>"]):
        ids = tokenizer.encode(text)
        assert ids == [1, *reference.encode(text), 2], text
        assert tokenizer.decode(ids) == reference.decode(ids), text


@pytest.mark.parametrize("legacy", [True, False, None])
def test_control_tokens_equal_transformers(sentencepiece_file: Path, tmp_path: Path, legacy: Any) -> None:
    transformers = pytest.importorskip("transformers")
    if "unigram" in str(sentencepiece_file):
        pytest.skip("transformers reads Llama's file as BPE")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in (
        "hello world",
        "<s>[INST] hello [/INST] the cat </s><s>[INST] x",
        "\nthe",
        "\u65e5\u672c \U0001f986</s>a",
    ):
        assert (
            tokenizer.encode_texts([MarkedText(text)])[0].ids == reference(text, add_special_tokens=False)["input_ids"]
        )


def test_leading_white_space_can_be_trimmed(sentencepiece_file: Path) -> None:
    """torchtune's rule: encode behind a newline and leave out what the newline gave."""
    tokenizer = load_tokenizer(sentencepiece_file)
    trimmed = tokenizer.encode("hello", False, False, trim_leading_whitespace=True)
    assert trimmed != tokenizer.encode("hello", False, False)
    assert tokenizer.decode([*tokenizer.encode("the", False, False), *trimmed]) == "thehello"
    assert tokenizer.encode("hello", False, False, trim_leading_whitespace=True, prefix="a") == trimmed


def test_messages_without_a_template_are_turns(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    messages = [Message("user", "the cat ", masked=True), Message("assistant", "sat"),
                Message("user", "hello", masked=True), Message("assistant", "fine")]  # fmt: skip
    ids, masked = tokenizer.tokenize_messages(messages)
    first = [1, *tokenizer.encode("the cat", False, False)]
    answer = [*tokenizer.encode("sat", False, False), 2]
    assert ids[: len(first) + len(answer)] == first + answer
    assert masked[: len(first) + len(answer)] == [True] * len(first) + [False] * len(answer)
    assert ids.count(1) == ids.count(2) == 2
    for limit in range(len(ids) + 2):
        assert tokenizer.tokenize_messages(messages, max_seq_len=limit) == (ids[:limit], masked[:limit])
    with pytest.raises(ValueError, match="empty list"):
        tokenizer.tokenize_messages([])
