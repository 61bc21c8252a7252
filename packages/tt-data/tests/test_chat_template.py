"""Rendering, ids and masks against transformers, for templates in the styles that models come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tt_data import Message, TemplateError, load_dataset, load_tokenizer
from tt_data.messages import mask_messages
from tt_data.rows.conversations import read_messages

TEMPLATES = Path(__file__).parent / "templates"
STYLES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
SPECIALS = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header|> <|end_header|> <|eot|> <start_of_turn> <end_of_turn> <|system|> "
    "<|user|> <|assistant|> <|end|> <|User|> <|Assistant|> <|end_of_sentence|> <|start|> <|channel|> <|message|> "
    "<|return|> [INST] [/INST]"
).split()
ENDS = {
    "header": "<|eot|>", "turns": "<end_of_turn>", "final_eos": "<|end|>", "opened_thinking": "<|end_of_sentence|>",
    "channels": "<|return|>", "inst": "</s>",
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "get", "description": 'Get <it> & "more" \u00e9', "parameters": {"type": "object"}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": {"q": "x"}}}


def turn(role: str, content: str, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "single": ([turn("user", "hello"), turn("assistant", "the cat")], None),
    "system": ([turn("system", "be nice"), turn("user", "hello"), turn("assistant", "the cat")], None),
    "unicode": ([turn("user", " \u65e5\u672c \U0001f986 "), turn("assistant", "na\u00efve \U0001f986")], None),
    "multi": (
        [turn("user", "a"), turn("assistant", "b. "), turn("user", " c?"), turn("assistant", "d\n\n"),
         turn("user", "e"), turn("assistant", "a")],
        None,
    ),
    "reasoning": (
        [turn("user", "a"), turn("assistant", "b", reasoning_content="hm"), turn("user", "c"),
         turn("assistant", "d", reasoning_content="so\nso")],
        None,
    ),
    "tools": (
        [turn("user", "a"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "42"),
         turn("assistant", "it is 42")],
        [TOOL],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("styles")
    return {
        style: make_model(
            root / style, SPECIALS, bos_token="<s>", eos_token=ENDS.get(style, "<|im_end|>"),
            pad_token="</s>", chat_template=(TEMPLATES / f"{style}.jinja").read_text(),
        )
        for style in STYLES
    }  # fmt: skip


def trained_texts(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, train_on: Any = "assistant") -> list[str]:
    """The trained text of a conversation, span by span."""
    rendered = tokenizer.render_conversations([(mask_messages(read_messages(turns), train_on), tools, {})])[0]
    if isinstance(rendered, TemplateError):
        raise rendered
    return [rendered.text[a:b] for a, b in rendered.trained]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_text_and_ids_equal_transformers(models: dict[str, Path], style: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(models[style])
    tokenizer = load_tokenizer(models[style])
    turns, tools = CONVERSATIONS[kind]
    try:
        wanted = reference.apply_chat_template(turns, tools=tools, tokenize=False)
    except Exception as refusal:
        with pytest.raises(TemplateError, match=str(refusal)):
            tokenizer.render(turns, tools)
        return
    assert tokenizer.render(turns, tools) == wanted
    prompt = reference.apply_chat_template(turns[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render(turns[:-1], tools, add_generation_prompt=True) == prompt
    assert tokenizer.encode_prompt(turns[:-1], tools) == reference(prompt, add_special_tokens=False)["input_ids"]
    rendered = tokenizer.render_conversations([(mask_messages(read_messages(turns), "all"), tools, {})])[0]
    assert tokenizer.encode_texts([rendered])[0].ids == reference(wanted, add_special_tokens=False)["input_ids"]


def test_generation_masks_equal_transformers(models: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(models["generation"])
    tokenizer = load_tokenizer(models["generation"])
    for kind in ("single", "system", "unicode", "multi"):
        turns, _ = CONVERSATIONS[kind]
        wanted = reference.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids, masked = tokenizer.tokenize_messages(mask_messages(read_messages(turns), "assistant"))
        assert ids == wanted["input_ids"]
        assert [int(not m) for m in masked] == wanted["assistant_masks"], kind


def test_prefix_masks_equal_the_marked_ones(models: dict[str, Path]) -> None:
    marked, plain = load_tokenizer(models["generation"]), load_tokenizer(models["chatml"])
    for kind in ("single", "system", "unicode", "multi"):
        messages = mask_messages(read_messages(CONVERSATIONS[kind][0]), "assistant")
        assert marked.tokenize_messages(messages) == plain.tokenize_messages(messages)


EXPECTED = {
    "chatml": ["b. <|im_end|>", "d\n\n<|im_end|>", "a<|im_end|>"],
    "generation": ["b. <|im_end|>", "d\n\n<|im_end|>", "a<|im_end|>"],
    "header": ["b.<|eot|>", "d<|eot|>", "a<|eot|>"],
    "inst": [" b. </s>", " d\n\n</s>", " a</s>"],
    "turns": ["b.<end_of_turn>", "d<end_of_turn>", "a<end_of_turn>"],
    "final_eos": ["b. <|end|>", "d\n\n<|end|>", "a<|end|>"],
    "thinking": ["b. <|im_end|>", "d\n\n<|im_end|>", "<think>\n\n</think>\n\na<|im_end|>"],
    "opened_thinking": ["b. <|end_of_sentence|>", "d\n\n<|end_of_sentence|>", "a<|end_of_sentence|>"],
    "channels": [
        "<|channel|>final<|message|>b. <|end|>", "<|channel|>final<|message|>d\n\n<|end|>",
        "<|channel|>final<|message|>a<|return|>",
    ],
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_the_mask_is_the_answers_with_their_end_token(models: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(models[style])
    turns, _ = CONVERSATIONS["multi"]
    assert trained_texts(tokenizer, turns, None) == EXPECTED[style]
    assert trained_texts(tokenizer, turns, None, "last") == EXPECTED[style][-1:]
    assert trained_texts(tokenizer, turns, None, "all") == [tokenizer.render(turns)]


@pytest.mark.parametrize("style", [style for style in STYLES if style != "opened_thinking"])
def test_what_is_trained_follows_what_inference_renders(models: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(models[style])
    turns, _ = CONVERSATIONS["multi"]
    rendered = tokenizer.render_conversations([(mask_messages(read_messages(turns), "assistant"), None, {})])[0]
    for (start, _), count in zip(rendered.trained, (1, 3, 5), strict=True):
        assert rendered.text[:start] == tokenizer.render(turns[:count], add_generation_prompt=True)


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_that_training_text_lacks_is_told(models: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(models[style])
    report = load_dataset([{"messages": CONVERSATIONS["single"][0]}], tokenizer).report
    assert ("generation prompt is not part of its training text" in str(report["notes"])) == (
        style == "opened_thinking"
    )
    assert bool(tokenizer.template_notes) == (style == "opened_thinking")


def test_calls_and_reasoning_are_trained(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(models["thinking"])
    call = '<tool_call>\n{"name": "get", "arguments": {"q": "x"}}\n</tool_call><|im_end|>'
    assert trained_texts(tokenizer, *CONVERSATIONS["tools"]) == [
        "<think>\n\n</think>\n\n" + call, "<think>\n\n</think>\n\nit is 42<|im_end|>",
    ]  # fmt: skip
    assert trained_texts(tokenizer, *CONVERSATIONS["reasoning"]) == [
        "b<|im_end|>",
        "<think>\nso\nso\n</think>\n\nd<|im_end|>",
    ]
    channels = load_tokenizer(models["channels"])
    assert trained_texts(channels, *CONVERSATIONS["reasoning"])[1] == (
        "<|channel|>analysis<|message|>so\nso<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>"
    )


def test_masked_messages_split_the_mask(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(models["chatml"])
    messages = [Message("user", "a"), Message("assistant", "b", masked=True), Message("user", "c", masked=True),
                Message("assistant", "d")]  # fmt: skip
    ids, masked = tokenizer.tokenize_messages(messages)
    kept = tokenizer.decode([i for i, m in zip(ids, masked, strict=True) if not m], skip_special=False)
    assert kept == "<|im_start|>user\na<|im_end|>\nd<|im_end|>"


def test_variables_reach_the_template(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(models["thinking"])
    turns = [turn("user", "a")]
    assert tokenizer.render(turns, add_generation_prompt=True, enable_thinking=False).endswith("</think>\n\n")
    assert tokenizer.render(turns, add_generation_prompt=True).endswith("assistant\n")


REWRITES = {
    "earlier turns in capitals": (
        "{% for m in messages %}{{ (m.content if loop.last else m.content|upper) + '<|im_end|>' }}{% endfor %}"
    ),
    "newest first": "{% for m in messages|reverse %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}",
}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_template_that_rewrites_what_was_said_is_refused(chatml: Any, rewrite: str) -> None:
    tokenizer = chatml.with_template({"default": REWRITES[rewrite]}, "rewriting")
    with pytest.raises(TemplateError, match="ambiguous") as refusal:
        trained_texts(tokenizer, CONVERSATIONS["multi"][0], None)
    assert refusal.value.ambiguous


@pytest.mark.parametrize(
    ("source", "trained", "lost"),
    [
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            ["b. <|im_end|>", "d\n\n<|im_end|>", "a<|im_end|>"],
            False,
        ),
        ("{% for m in messages[-2:] %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}", ["a<|im_end|>"], True),
    ],
)
def test_answers_behind_a_rewritten_prompt_are_found_and_it_is_told(
    chatml: Any, source: str, trained: list[str], lost: bool
) -> None:
    dataset = load_dataset([{"messages": CONVERSATIONS["multi"][0]}], chatml.with_template({"default": source}, "x"))
    assert [text for text, flag in dataset.rendered(0) if flag] == trained
    notes = " ".join(dataset.report["notes"])
    assert "generation prompt is not part of its training text" in notes
    assert ("does not write words of some messages (1 row" in notes) == lost


def test_marked_blocks_help_a_template_that_rewrites(chatml: Any) -> None:
    source = (
        "{{ messages|length }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = chatml.with_template({"default": source}, "marked")
    turns, _ = CONVERSATIONS["multi"]
    assert trained_texts(tokenizer, turns, None) == ["b. <|im_end|>", "d\n\n<|im_end|>", "a<|im_end|>"]
    assert trained_texts(tokenizer, turns, None, "last") == ["a<|im_end|>"]


def test_a_marked_block_that_holds_the_header_of_its_turn_is_trained_behind_it(chatml: Any) -> None:
    for before, inside in (
        ("", "<|im_start|>assistant\n"),
        ("<|im_start|>assistant", "\n"),
        ("<|im_start|>", "assistant\n"),
    ):
        source = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ '"
            + before
            + "' }}{% generation %}{{ '"
            + inside
            + "' + m.content }}<|im_end|>{% endgeneration %}{% else %}"
            "<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>"
            "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        tokenizer = chatml.with_template({"default": source}, "marked")
        turns = [turn("user", "a"), turn("assistant", "\nb"), turn("user", "c"), turn("assistant", "assistant d")]
        assert trained_texts(tokenizer, turns, None) == ["\nb<|im_end|>", "assistant d<|im_end|>"]


@pytest.mark.parametrize("layout", ["file", "string", "list", "additional", "chat_template.json"])
def test_templates_are_found_wherever_models_keep_them(layout: str, tmp_path: Path, make_model: Any) -> None:
    transformers = pytest.importorskip("transformers")
    source, other = "{{ messages[0].content }}", "{{ 'tools ' + messages[0].content }}"
    config: dict[str, Any] = {"string": {"chat_template": source}, "list": {
        "chat_template": [{"name": "default", "template": source}, {"name": "tool_use", "template": other}]
    }}.get(layout, {"chat_template": "old"} if layout in ("file", "additional") else {})  # fmt: skip
    model = make_model(tmp_path / "model", ["<s>"], **config)
    if layout in ("file", "additional"):
        (model / "chat_template.jinja").write_text(source)
    if layout == "additional":
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(other)
    if layout == "chat_template.json":
        (model / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    tokenizer = load_tokenizer(model)
    turns = [turn("user", "hi")]
    assert tokenizer.has_chat_template
    assert tokenizer.render(turns) == "hi"
    expected = "tools hi" if layout in ("list", "additional") else "hi"
    assert tokenizer.render(turns, [TOOL]) == expected
    if layout != "chat_template.json":
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        assert reference.apply_chat_template(turns, tools=[TOOL], tokenize=False) == expected
