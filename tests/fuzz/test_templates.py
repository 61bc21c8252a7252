"""Chat templates, and conversations through the built-in ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from tt_data import CHAT_TEMPLATES, TemplateError, choose_template, load_dataset, load_tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TURNS = [
    {"role": "system", "content": "Be brief. <|im_end|>"},
    {"role": "user", "content": [{"type": "text", "text": "hi </s"}]},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "1", "tool_call_id": "a"},
    {"role": "assistant", "content": "one", "reasoning_content": "think"},
]
ROW = {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
SOURCES = [
    *CHAT_TEMPLATES.values(),
    "{% macro f(n) %}{{ f(n - 1) if n > 0 }}{% endmacro %}{% set ns = namespace(x=cycler(1, 2)) %}{{ f(3) }}"
    "{% for i in range(9) %}{% generation %}{{ ns.x.next() ~ messages[0].content[:3] }}{% endgeneration %}{% endfor %}",
    "{{ raise_exception('no') if tools else (messages | tojson(indent=2)) }}{{ '%9d' % 1 }}{{ 'a' | center(9) * 99 }}"
    "{{ strftime_now('%Y') }}{{ lipsum(n=1) }}{% for m in messages | sort(attribute='role') %}{{ m }}{% endfor %}",
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {chr(i): i - 33 for i in range(33, 127)} | {"\u0120": 94, "\u010a": 95}
    vocab |= {token: 96 + i for i, token in enumerate(SPECIALS)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data = {
        "version": "1.0", "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in SPECIALS],
        "pre_tokenizer": byte_level, "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(tmp_path)


def test_any_template_renders_or_is_one_of_our_errors(tokenizer: Any, fuzz: Any) -> None:
    def read(data: bytes) -> None:
        chosen = tokenizer.with_template({"default": data.decode("utf-8", "replace")}, "x.jinja")
        try:
            load_dataset([ROW, {"messages": TURNS[1:2] + TURNS[4:]}], chosen, on_bad_row="drop")
        finally:
            for template in chosen._compiled.values():
                template.close()

    fuzz(read, fuzz.mutated(*(source.encode() for source in SOURCES)))


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_any_messages_render_or_are_one_of_our_errors(tokenizer: Any, fuzz: Any, name: str) -> None:
    chosen = choose_template(tokenizer, name)

    def read(row: object) -> None:
        if not isinstance(row, dict):
            return
        load_dataset([row], chosen)
        try:
            if isinstance(row.get("messages"), list):
                chosen.encode_prompt([turn for turn in row["messages"] if isinstance(turn, dict)])
        except TemplateError:
            pass

    fuzz(read, fuzz.mutated_json(ROW, {"messages": TURNS[1:2] + TURNS[4:]}))
