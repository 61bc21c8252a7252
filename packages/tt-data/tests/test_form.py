"""Whether the chat template made the text: what a model was trained on is what it must be asked in."""

from __future__ import annotations

from typing import Any

import pytest

from tt_data import batches, load_dataset

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "hello", "input": "", "output": "the cat"},
    "openai": {"messages": CHAT},
    "text": {"text": "hello the cat"},
    "preference": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "a mat"}]},
}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_report_says_whether_the_chat_template_made_the_text(
    chatml: Any, llama: Any, write_jsonl: Any, streaming: bool
) -> None:
    """``form`` is chat, text, or both."""

    def form(source: Any, tokenizer: Any, **options: Any) -> str:
        dataset = load_dataset(source, tokenizer, streaming=streaming, **options)
        if streaming:
            assert dataset.report["form"] == ""  # nothing has been read yet
            next(batches(dataset, batch_size=2))
        return str(dataset.report["form"])

    chat = write_jsonl([ROWS["openai"], ROWS["openai"]], "chat.jsonl")
    text = write_jsonl([ROWS["text"], {"text": "more"}], "text.jsonl")
    assert form(chat, chatml) == "chat"
    assert form(text, chatml) == "text"
    assert form({chat: 1, text: 1}, chatml) == "chat+text"
    packed: dict[str, Any] = {"packing": True, "max_seq_len": 64}
    assert form(chat, chatml, **packed) == "chat"
    alpaca = write_jsonl([ROWS["alpaca"]] * 2, "alpaca.jsonl")
    assert form(alpaca, chatml) == "chat"
    assert form(alpaca, chatml, template="alpaca") == "text"
    assert form(alpaca, llama) == "text"
    pairs = [{"prompt": "a ", "chosen": "b", "rejected": "c"}, ROWS["preference"]]
    assert [form([pair] * 2, chatml) for pair in pairs] == ["text", "chat"]
