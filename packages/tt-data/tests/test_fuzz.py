"""Whatever is thrown at the parsers, they return or raise one of our errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tt_data import load_dataset, load_tokenizer
from tt_data.examples import BadRowError
from tt_data.rows.conversations import read_messages
from tt_data.rows.folders import read_rows

SCRAPS: list[Any] = [
    None, True, 0, -1, 1.5, "", " ", "a", "user", "assistant", "<|im_end|>", "{}", "[", [], {}, [None], ["a"],
    {"role": "user"}, {"role": "assistant", "content": "b"}, {"from": "human", "value": 1},
    {"type": "text", "text": "x"}, 10**30, "\ud800",
]  # fmt: skip
KEYS = (
    "messages conversations role content from value text prompt completion chosen rejected label instruction output "
    "input input_ids labels tools tool_calls weight system function arguments name x"
).split()


def assert_one_line(refusal: ValueError, place: str = "") -> None:
    assert str(refusal)
    assert "\n" not in str(refusal)
    assert place in str(refusal)


def scrap(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth < 3 else 1)
    if kind == 1:
        return [scrap(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        return {rng.choice(KEYS): scrap(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(SCRAPS)


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_scraps(chatml: Any, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        rows = [{rng.choice(KEYS): scrap(rng) for _ in range(rng.randint(1, 5))} for _ in range(3)]
        try:
            dataset = load_dataset(rows, chatml, max_seq_len=rng.choice([None, 8]))
        except ValueError as refusal:
            assert_one_line(refusal)
        else:
            assert len(dataset) + sum(dataset.report["dropped"].values()) == 3


def test_messages_of_scraps() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        try:
            read_messages(scrap(rng))
        except BadRowError as refusal:
            assert_one_line(refusal)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_files_with_flipped_bytes(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"a {i}", "completion": "b\n\u00e9"} for i in range(5)]
    good = {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        ".json": json.dumps(rows, ensure_ascii=False),
        ".csv": 'prompt,completion\n"a, 1","b\nc"\nd,e\n',
    }[suffix].encode()
    path = tmp_path / f"rows{suffix}"
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
        try:
            list(read_rows(path))
        except ValueError as refusal:
            assert_one_line(refusal, str(path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_with_flipped_bytes(tmp_path: Path, chatml_dir: Path, name: str) -> None:
    rng = random.Random(0)
    for other in chatml_dir.iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    good = (chatml_dir / name).read_bytes()
    for _ in range(60):
        data = bytearray(good)
        data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / name).write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.encode("the cat <|im_end|>")
        except ValueError as refusal:
            assert_one_line(refusal)


CONFIGS: list[Any] = [
    [], 5, {"chat_template": 5}, {"chat_template": [{"name": "x"}]}, {"chat_template": [5]}, {"eos_token": 5},
    {"eos_token": []},
    {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"1": "a"}},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", ["json", "spm"])
def test_odd_configurations(tmp_path: Path, chatml_dir: Path, sentencepiece_file: Path, config: Any, form: str) -> None:
    source = chatml_dir / "tokenizer.json" if form == "json" else sentencepiece_file
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(tmp_path).encode("a")
    except ValueError as refusal:
        assert_one_line(refusal, str(tmp_path))
