"""Which chat template a tokenizer gets, and those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tt_data import CHAT_TEMPLATES, choose_template, load_dataset, load_tokenizer, register_chat_template

TURNS = [
    {"role": "system", "content": "be nice"}, {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the cat"}, {"role": "user", "content": "and"},
    {"role": "assistant", "content": "fine"},
]  # fmt: skip
TEXTS = {
    "chatml": (
        "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        "the cat<|im_end|>\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n"
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nbe nice\n<</SYS>>\n\nhello [/INST] the cat </s><s>[INST] and [/INST] fine </s>"
    ),
    "mistral": "<s>[INST] be nice\n\nhello [/INST] the cat</s>[INST] and [/INST] fine</s>",
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe nice<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nthe cat<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nand<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nfine<|eot_id|>"
    ),
    "gemma": (
        "<s><start_of_turn>user\nbe nice\n\nhello<end_of_turn>\n<start_of_turn>model\nthe cat<end_of_turn>\n"
        "<start_of_turn>user\nand<end_of_turn>\n<start_of_turn>model\nfine<end_of_turn>\n"
    ),
    "zephyr": (
        "<|system|>\nbe nice</s>\n<|user|>\nhello</s>\n<|assistant|>\nthe cat</s>\n<|user|>\nand</s>\n"
        "<|assistant|>\nfine</s>\n"
    ),
    "plain": "<s>System: be nice\n\nUser: hello\n\nAssistant: the cat</s>\n\nUser: and\n\nAssistant: fine</s>\n\n",
}  # fmt: skip
SPECIALS = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>"
)


def test_every_template_has_its_text() -> None:
    assert set(TEXTS) == set(CHAT_TEMPLATES)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_to_the_byte_for_a_model_that_knows_the_tokens(name: str, tmp_path: Path, make_model: Any) -> None:
    model = make_model(tmp_path / "model", SPECIALS.split(), bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(model, template=name)
    assert tokenizer.render(TURNS) == TEXTS[name]
    prompt = tokenizer.render(TURNS[:4], add_generation_prompt=True)
    assert TEXTS[name].startswith(prompt)
    assert TEXTS[name][len(prompt) :].strip().startswith("fine")
    assert load_dataset([{"messages": TURNS}], tokenizer).report["no_end_token"] == 0


@pytest.mark.parametrize("name", TEXTS)
def test_a_model_that_knows_no_such_token_learns_to_stop_all_the_same(name: str, llama: Any) -> None:
    dataset = load_dataset([{"messages": TURNS}], llama, template=name)
    assert dataset.report["no_end_token"] == 0
    trained = [text for text, flag in dataset.rendered(0) if flag]
    assert len(trained) == 2
    assert all(text.rstrip().endswith("</s>") for text in trained)
    assert dataset.tokenizer.eos_ids == (llama.eos_id,)


def test_templates_come_from_files_and_from_people(llama: Any, llama_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}={{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer = load_tokenizer(llama_dir, template=str(path))
    assert tokenizer.render(TURNS[1:3]) == "user=hello</s>assistant=the cat</s>"
    register_chat_template("mine", path.read_text())
    try:
        assert load_tokenizer(llama_dir, template="mine").render(TURNS[1:3]) == tokenizer.render(TURNS[1:3])
    finally:
        del CHAT_TEMPLATES["mine"]
    with pytest.raises(ValueError, match="unknown template 'mien', expected one of chatml, .* or a .jinja file"):
        load_tokenizer(llama_dir, template="mien")
    with pytest.raises(FileNotFoundError, match="no such template file"):
        load_tokenizer(llama_dir, template="nowhere.jinja")


def test_a_template_that_is_chosen_again_keeps_its_process(chatml: Any) -> None:
    chosen = choose_template(chatml, "llama3")
    assert chosen is not chatml
    assert choose_template(chosen, "llama3") is chosen
    assert choose_template(chosen, None) is chosen
    assert choose_template(chosen, "alpaca") is chosen  # an instruct template changes rows, not the tokenizer
    in_text = choose_template(chosen, "llama3", special_tokens="tokens")
    assert in_text._template(None) is chosen._template(None)
