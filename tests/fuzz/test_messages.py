"""Rows of each schema to token rows, and the settings that say how."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tt_data

U, A = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, {"y": null}]}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEEDS: dict[str, list[Any]] = {
    "openai": [
        {"messages": [{"role": "system", "content": "s"}, U, {**A, "weight": 1}, {**U, "name": "x"}, A]},
        {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "tool_call_id": "1", "content": {"r": [1]}}, A], "tools": TOOLS},
        {"messages": json.dumps([U, {**A, "content": [{"type": "text", "text": "b"}], "reasoning_content": "r"}])},
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value":
                  '{"name": "f", "arguments": {}}'}, {"from": "observation", "value": "7"},
                  {"from": "gpt", "value": "b", "train": False}], "system": "s", "tools": json.dumps(TOOLS)}],
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "s"}],
    "prompt_completion": [{"prompt": "a", "completion": "b"}, {"prompt": [U], "completion": [A], "history": []}],
    "text": [{"text": "a <|im_end|> b"}, {"text": json.dumps([U, A])}],
    "pretokenized": [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "attention_mask": [1, 1, 1, 1],
                      "position_ids": [0, 1, 2, 3], "completion_mask": [0, 1, 1, 1]}],
    "preference": [{"prompt": "a", "chosen": "b", "rejected": "c"},
                   {"chosen": [U, A], "rejected": [U, {**A, "content": "c"}]}],
    "unpaired_preference": [{"prompt": "a", "completion": "b", "label": True}, {"messages": [U, A], "label": False}],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tt_data.load_tokenizer(folder)


def read(tokenizer: Any, rows: Any, **settings: Any) -> None:
    """Rows as they would be trained, and what every verb says of them."""
    dataset = tt_data.load_dataset(rows, tokenizer, **settings)
    lines = [*tt_data.summary_lines(dataset.report), *dataset.report["problems"]]
    assert all(line.isprintable() and len(line) < 4000 for line in lines), lines
    for sample in tt_data.show(dataset):
        assert all(c.isprintable() or c in "\n\t" for c in tt_data.as_text(sample))


@pytest.mark.parametrize("schema", SEEDS)
def test_any_row_is_trained_dropped_or_refused(fuzz: Any, tokenizer: Any, schema: str) -> None:
    good = SEEDS[schema][0]

    def check(row: Any) -> None:
        if isinstance(row, str):  # the name of a file
            return
        read(tokenizer, [row])
        read(tokenizer, [good, row], max_seq_len=64)

    fuzz(check, fuzz.mutated_json(*SEEDS[schema]))


def test_any_line_is_trained_dropped_or_refused(fuzz: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"

    def check(line: bytes) -> None:
        file.write_bytes(line)
        read(tokenizer, str(file), limit=5)

    fuzz(check, fuzz.mutated(*(json.dumps(row).encode() for rows in SEEDS.values() for row in rows)))


SETTINGS = {
    "columns": {"messages": "messages"}, "train_on": "assistant", "max_seq_len": 64, "packing": False, "split": "train",
    "seed": 0, "streaming": False, "template": None, "schema": "openai", "on_bad_row": "drop", "special_tokens":
    "text", "drop_duplicates": True, "max_dropped_share": 0.5, "buffer": 10, "num_workers": 0, "timeout_s": 9.0,
    "data_dir": "data", "data_files": ["rows.jsonl"], "revision": None, "limit": None,
}  # fmt: skip


def test_any_settings_are_taken_or_refused(fuzz: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in SEEDS["openai"][:2]))

    def check(settings: Any) -> None:
        if not isinstance(settings, dict) or not set(settings) <= set(SETTINGS):
            return
            settings["num_workers"] = 0
        dataset = tt_data.load_dataset(str(tmp_path), tokenizer, **settings)
        if settings.get("streaming") is not True:
            tt_data.summary_lines(dataset.report)

    fuzz(check, fuzz.mutated_json(SETTINGS, {**SETTINGS, "streaming": True}))


NAMES = [
    "rows.jsonl", "data", "org/name", "org/name:config", "data/*.jsonl", "text", "hf://datasets/org/name/x.jsonl",
    "~/rows.jsonl", "../x", "/etc/passwd", "file:///x", "C:\\x\\y.jsonl", "https://example.invalid/x.jsonl",
]  # fmt: skip


def test_any_name_is_a_source_or_one_of_our_errors(fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tt_data.rows.sources import NO_PART, is_hub_id, open_sources

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def check(data: bytes) -> None:
        name = data.decode("utf-8", "surrogateescape")[:2000]
        if not is_hub_id(name) and not name.startswith(("/", "~", "..")) and "*" not in name:  # not all of the disk
            open_sources(name, NO_PART)

    fuzz(check, fuzz.mutated(*(name.encode() for name in NAMES)))
