"""tokenizer.json and the files beside it, sentencepiece models, tiktoken files."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_tokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
LETTERS = {chr(i): i - 33 for i in range(33, 127)} | {"\u0120": 94, "\u010a": 95, "ab": 96, "<s>": 97, "\u2581": 98}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s?\w+|[0-9]{1,3}"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEMPLATE = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [97], "tokens": ["<s>"]}},
}  # fmt: skip
BPE = {
    "version": "1.0", "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 1},
    "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    "added_tokens": [{"id": 97, "content": "<s>", **FLAGS}, {"id": 99, "content": "<x>", **FLAGS}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "a"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, {**BYTES, "use_regex": False}]},
    "post_processor": TEMPLATE, "decoder": BYTES,
    "model": {"type": "BPE", "vocab": LETTERS, "merges": [["a", "b"]], "dropout": None, "unk_token": None},
}  # fmt: skip
UNIGRAM = {
    **BPE, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(1024)).decode()},
    "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.0], ["\u2581", -2.5], ["ab", -1.5]]},
}  # fmt: skip
WORDS = {
    **BPE, "normalizer": {"type": "Replace", "pattern": {"Regex": "b+"}, "content": "c"},
    "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {"type": "WordPiece", "unk_token": "a", "vocab": LETTERS, "max_input_chars_per_word": 50},
}  # fmt: skip
CONFIG = {
    "bos_token": "<s>", "eos_token": {"content": "<x>", "special": True}, "add_bos_token": True, "legacy": False,
    "additional_special_tokens": ["<x>"], "extra_special_tokens": {"image_token": "<x>"},
    "auto_map": {"x": ["y", None]},
    "added_tokens_decoder": {"97": {"content": "<s>", "special": True}},
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
}  # fmt: skip
TEXTS = ["hello ab <s> 123", "", "\u00e9\u65e5\x00", "a" * 3000 + "!", " " * 3000]


def use(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert isinstance(tokenizer.decode(ids, skip_special=False), str)


@pytest.mark.parametrize("seed", [BPE, UNIGRAM, WORDS], ids=["bpe", "unigram", "words"])
def test_any_json_is_a_tokenizer_or_one_of_our_errors(tmp_path: Path, fuzz: Any, seed: Any) -> None:
    def read(value: object) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(value))
        use(tmp_path)

    fuzz(read, fuzz.mutated_json(seed))


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json"]
)
@pytest.mark.parametrize("model", [False, True])
def test_any_json_beside_a_tokenizer_is_read_or_one_of_our_errors(
    tmp_path: Path, fuzz: Any, name: str, model: bool
) -> None:
    if model:
        (tmp_path / "tokenizer.model").write_bytes(ranks())
    else:
        (tmp_path / "tokenizer.json").write_text(json.dumps(BPE))
    seed = {
        "generation_config.json": {"eos_token_id": [97, 99]}, "added_tokens.json": {"<y>": 100},
    }.get(name, CONFIG)  # fmt: skip

    def read(value: object) -> None:
        (tmp_path / name).write_text(json.dumps(value))
        load_tokenizer(tmp_path)

    fuzz(read, fuzz.mutated_json(seed))


def ranks() -> bytes:
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abab"]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def piece(text: str, score: float, kind: int) -> bytes:
    import struct

    body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
    body += b"\x18" + bytes([kind]) if kind != 1 else b""
    return b"\x0a" + bytes([len(body)]) + body


def sentencepiece_model() -> bytes:
    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
    pieces += [piece(f"<0x{i:02X}>", 0, 6) for i in range(256)]
    pieces += [piece(text, -i, 1) for i, text in enumerate(["\u2581", "a", "b", "ab", "\u2581a"])]
    trainer = b"\x12\x05\x18\x02\xa0\x02\x01"  # model_type BPE, byte_fallback
    normalizer = b"\x1a\x0c\x0a\x08identity\x18\x01"
    return b"".join(pieces) + trainer + normalizer


@pytest.mark.parametrize("kind", ["tokenizer.json", "tiktoken", "sentencepiece", "tokenizer_config.json"])
def test_any_bytes_are_a_tokenizer_or_one_of_our_errors(tmp_path: Path, fuzz: Any, kind: str) -> None:
    seed = {
        "tokenizer.json": json.dumps(BPE).encode(), "tiktoken": ranks(), "sentencepiece": sentencepiece_model(),
        "tokenizer_config.json": json.dumps(CONFIG).encode(),
    }[kind]  # fmt: skip
    file = tmp_path / (kind if kind.endswith(".json") else "tokenizer.model")
    if kind == "tokenizer_config.json":
        (tmp_path / "tokenizer.json").write_text(json.dumps(BPE))

    def read(data: bytes) -> None:
        file.write_bytes(data)
        use(tmp_path)

    fuzz(read, fuzz.mutated(seed))
