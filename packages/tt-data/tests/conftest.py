"""Tiny tokenizers, trained here with a fixed seed, in the layouts that models come in."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

WORDS = (
    "the cat sat on a mat and hello world how are you fine user assistant system question answer Sort these words "
    "na\u00efve \u65e5\u672c\u8a9e 1234 def f(x): return <b> [INST] think"
).split()


def corpus() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(400):
        yield " ".join(rng.choices(WORDS, k=9)) + rng.choice([".", "!\n", "\n\n", ""])


def byte_level(specials: list[str], vocab_size: int = 500) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def llama_like() -> Tokenizer:
    """BPE with byte fallback and the prefix space of Llama 2, bos by a post-processor."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram, whose model itself holds its control tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory like Qwen's: byte-level BPE, ChatML, no bos."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    return write_model(tmp_path_factory.mktemp("chatml") / "model", tokenizer, **config)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model like Llama 2: bos first, no chat template."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write_model(tmp_path_factory.mktemp("llama") / "model", llama_like(), **config)


@pytest.fixture(scope="session")
def unigram_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return write_model(tmp_path_factory.mktemp("unigram") / "model", unigram(), **config)


def train_sentencepiece(kind: str) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=model, vocab_size=420 if kind == "bpe" else 320, model_type=kind,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def sentencepiece_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"sentencepiece-{request.param}") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(request.param))
    return path


@pytest.fixture(scope="session")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bare tokenizer.model, as torchtune takes it."""
    from tt_data import load_tokenizer

    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(train_sentencepiece("bpe"))
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def chatml(chatml_dir: Path) -> Any:
    from tt_data import load_tokenizer

    return load_tokenizer(chatml_dir)


@pytest.fixture(scope="session")
def llama(llama_dir: Path) -> Any:
    from tt_data import load_tokenizer

    return load_tokenizer(llama_dir)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """``make_model(directory, specials, **tokenizer_config)``: a byte-level model directory."""

    def make(directory: Path, specials: list[str], **config: Any) -> Path:
        return write_model(directory, byte_level(specials), **config)

    return make


def chat_rows(count: int, turns: int = 1) -> list[dict[str, Any]]:
    """Conversations of which no two are equal."""
    return [
        {
            "messages": [
                {"role": role, "content": f"{WORDS[(i + t) % len(WORDS)]} {i} {t}"}
                for t in range(turns)
                for role in ("user", "assistant")
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def make_chat_rows() -> Callable[..., list[dict[str, Any]]]:
    return chat_rows


ALPHABET = (
    "the", "cat", " ", "  ", "\n", "\t", ".", "'s", "12", "345", "\u00e9", "\u65e5\u672c", "\U0001f986", "\u0301", "a",
    "Z", "<", "|", ">", "_", "\u2581", "\u00a0", "\x00", "\u200b", "def", "]", "[INST]",
)  # fmt: skip


@pytest.fixture(scope="session")
def random_strings() -> Callable[..., list[str]]:
    """``random_strings(count, seed, extra)``: strings of awkward pieces, and of the pieces in ``extra``."""

    def strings(count: int, seed: int, extra: tuple[str, ...] | list[str] = ()) -> list[str]:
        rng = random.Random(seed)
        return ["".join(rng.choices([*ALPHABET, *extra], k=rng.randint(0, 14))) for _ in range(count)]

    return strings
