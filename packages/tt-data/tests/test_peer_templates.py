"""Templates of real models, as TRL ships them, against transformers' rendering and against TRL's own marked copies."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tt_data import load_dataset, load_tokenizer
from tt_data.messages import mask_messages
from tt_data.rows.conversations import read_messages

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


# Every template that TRL ships, over every kind of conversation.
ROLE_TOKENS = re.compile(
    r"<\|(?:tool_call|tool_response|tool|turn|channel)>|<(?:tool_call|tool_response|tool|turn|channel)\|>"
)
OTHERS = re.compile(r"<(?:end_of_utterance|/s|s)>")
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "get"}
TOOL = {
    "type": "function",
    "function": {"name": "get", "description": "Find out.", "parameters": {
        "type": "object", "properties": {"q": {"type": "string", "description": "What."}}, "required": ["q"]}},
}  # fmt: skip


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "get", "arguments": arguments}
    found = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [found], **more}


def think(turn: dict[str, Any], thought: str) -> dict[str, Any]:
    return {**turn, "reasoning_content": thought}


TOOLS = [TURNS[0], call({"q": "rain"}), RESULT, TURNS[1], TURNS[2], call({"q": "snow"}), RESULT, TURNS[3]]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": TURNS[:2],
    "two turns": TURNS,
    "system": [{"role": "system", "content": "be nice"}, *TURNS],
    "reasoning": [TURNS[0], think(TURNS[1], "hmm so"), TURNS[2], think(TURNS[3], "well then")],
    "tools": TOOLS,
    "tools, system and reasoning": [
        {"role": "system", "content": "be nice"},
        *[think(turn, f"thought {i}") if turn["role"] == "assistant" else turn for i, turn in enumerate(TOOLS)],
    ],
    "tools of an agent that thinks": [
        think(turn, f"thought {i}") if turn["role"] == "assistant" else turn
        for i, turn in enumerate([*TOOLS[:3], call({"q": "hail"}), *TOOLS[2:6], RESULT, call({"q": "fog"}), *TOOLS[6:]])
    ],
    "parts": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS],
}


def peer_templates() -> list[str]:
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path()
    return sorted(path.stem for path in folder.glob("*.jinja") if not path.stem.endswith("_training")) or ["trl"]


@pytest.fixture(scope="module", params=peer_templates())
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> tuple[Any, Any]:
    """Our tokenizer and transformers', with a template of TRL's."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    source = (Path(trl.__file__).parent / "chat_templates" / f"{request.param}.jinja").read_text()
    found = {token for pattern in (TOKENS, ROLE_TOKENS, OTHERS) for token in pattern.findall(source)}
    eos = next((end for end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>") if end in found), "<|endoftext|>")
    specials = sorted(found | {"<s>", "<|endoftext|>"})
    path = make_model(
        tmp_path_factory.mktemp("peer") / "model", specials, bos_token="<s>", eos_token=eos, chat_template=source
    )
    return load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)


def tokenizer_refuses(tokenizer: Any, row: dict[str, Any]) -> bool:
    try:
        load_dataset([row], tokenizer)
    except ValueError as refusal:
        return "1 of 1 row is bad (1 template)" in str(refusal) or "1 system message refused" in str(refusal)
    return False


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_rows_are_rendered_like_transformers_and_exactly_the_answers_are_trained(
    peer: tuple[Any, Any], kind: str
) -> None:
    tokenizer, reference = peer
    turns, tools = CONVERSATIONS[kind], [TOOL] if "tools" in kind else None
    row = {"messages": turns, "tools": tools} if tools else {"messages": turns}
    try:
        wanted = reference.apply_chat_template(turns, tools=tools, tokenize=False)
    except Exception:
        wanted = None  # refused, or not in this form
    if wanted is None and tokenizer_refuses(tokenizer, row):
        return
    dataset = load_dataset([row], tokenizer)
    text = "".join(piece for piece, _ in dataset.rendered(0))
    words = [turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"] for turn in turns]
    if wanted is not None and "'text'" not in wanted and '"text"' not in wanted and all(w in wanted for w in words):
        assert text == wanted  # else transformers printed the list itself, or nothing of the turns
    notes = " ".join(dataset.report["notes"])
    trained = [piece for piece, flag in dataset.rendered(0) if flag]
    for number, turn in enumerate(turns):
        said = "".join(trained)
        content = turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"]
        if turn["role"] == "assistant" and content:
            assert content in said, number
        elif content:
            assert content not in said, number
        for thought in [turn["reasoning_content"]] if "reasoning_content" in turn else []:
            assert thought in said or "does not write the reasoning" in notes
        for one in turn.get("tool_calls", ()):
            assert one["function"]["arguments"]["q"] in said or "does not write tool_calls" in notes
    assert not re.search(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|user\|>.", "".join(trained))
    assert dataset.report["no_end_token"] == ("[gMASK]" in text)  # GLM's last answer has none


@pytest.mark.parametrize("content", [None, "words first"])
@pytest.mark.parametrize("name", ["deepseekv3", "qwen2_5", "qwen3", "llama3_1", "qwen3_5_think"])
def test_calls_without_words_are_rendered_like_transformers(
    name: str, content: str | None, tmp_path: Path, make_model: Any
) -> None:
    """Keys without a value are left out by both; a template that cannot do without (DeepSeek's) is given no words."""
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
    except jinja2.UndefinedError:
        wanted = reference.apply_chat_template([turns[0], {**turns[1], "content": ""}], tokenize=False)
    assert tokenizer.render(turns) == wanted
    assert "get" in wanted
