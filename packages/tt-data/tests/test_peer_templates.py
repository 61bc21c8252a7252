"""Templates of real models, as TRL ships them, against transformers' rendering and against TRL's own marked copies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tt_data import TemplateError, load_tokenizer
from tt_data.conversations import read_messages
from tt_data.encode import mask_messages

TOKENS = re.compile(r"<\|[\w.\- ]+\|>|<\uff5c[^\uff5c]+\uff5c>|<(?:bos|eos|end_of_turn|start_of_turn)>")
ENDS = {
    "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3_instruct_2507": "<|im_end|>", "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>", "phi3": "<|end|>", "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseekv3": "<\uff5cend\u2581of\u2581sentence\uff5c>", "gptoss": "<|return|>",
}  # fmt: skip
TURNS = [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "how \u00e9 are you?"}, {"role": "assistant", "content": "fine \U0001f986"},
]  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_templates_of_real_models(name: str, tmp_path: Path, make_model: Any) -> None:
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    folder = Path(trl.__file__).parent / "chat_templates"
    if not (folder / f"{name}.jinja").exists():
        pytest.skip("not in this version of trl")
    source = (folder / f"{name}.jinja").read_text()
    marked = folder / f"{name}_training.jinja"
    specials = sorted({*TOKENS.findall(source), "<s>", "<|endoftext|>"})
    eos = "<|endoftext|>" if name == "phi3" else ENDS[name]
    model = make_model(tmp_path / "model", specials, bos_token="<s>", eos_token=eos, chat_template=source)
    tokenizer = load_tokenizer(model)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    assert tokenizer.render(TURNS) == reference.apply_chat_template(TURNS, tokenize=False)
    prompt = reference.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.encode_prompt(TURNS[:3]) == prompt

    ids, masked = tokenizer.tokenize_messages(mask_messages(read_messages(TURNS), "assistant"))
    assert ids == reference.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert tokenizer.token_id(ENDS[name]) in tokenizer.eos_ids
    trained = tokenizer.decode([i for i, m in zip(ids, masked, strict=True) if not m], skip_special=False)
    assert trained.count("the cat") == trained.count("fine \U0001f986") == 1
    assert trained.endswith(ENDS[name])
    assert "hello" not in trained
    assert masked[: len(prompt)].count(False) < masked.count(False)
    if marked.exists():
        theirs = reference.apply_chat_template(
            TURNS, chat_template=marked.read_text(), return_dict=True, return_assistant_tokens_mask=True
        )
        if theirs["input_ids"] == ids:  # else their copy renders earlier turns otherwise
            both = list(zip(ids, masked, theirs["assistant_masks"], strict=True))
            assert not [i for i, ours_masked, trained_there in both if not ours_masked and not trained_there]
            spare = tokenizer.decode([i for i, ours_masked, there in both if ours_masked and there], skip_special=False)
            assert not {"hello", "cat", "fine"} & set(re.findall(r"\w+", spare))  # headers, and line ends behind a turn


@pytest.mark.parametrize("content", [None, "words first"])
@pytest.mark.parametrize("name", ["deepseekv3", "qwen2_5", "qwen3", "llama3_1", "qwen3_5_think"])
def test_calls_without_words_are_rendered_like_transformers(
    name: str, content: str | None, tmp_path: Path, make_model: Any
) -> None:
    """Keys without a value are left out by both; a template that cannot do without (DeepSeek's) fails in both."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip("not in this version of trl")
    source = file.read_text()
    specials = sorted({*TOKENS.findall(source), "<s>", "<|im_end|>"})
    model = make_model(tmp_path / "model", specials, bos_token="<s>", eos_token="<|im_end|>", chat_template=source)
    arguments: Any = {"q": "x"}
    if name == "deepseekv3":  # it puts them into text, so they must be text
        arguments = '{"q": "x"}'
    call = {"type": "function", "function": {"name": "get", "arguments": arguments}}
    turns = [TURNS[0], {"role": "assistant", "content": content, "tool_calls": [call]}]
    tokenizer = load_tokenizer(model)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    try:
        wanted = reference.apply_chat_template(turns, tokenize=False)
    except jinja2.UndefinedError as refusal:
        with pytest.raises(TemplateError, match=str(refusal)):
            tokenizer.render(turns)
        return
    assert tokenizer.render(turns) == wanted
    assert "get" in wanted
