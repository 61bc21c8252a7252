"""What opens and ends a turn, for templates that do it in their own ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from tt_data import load_dataset, load_tokenizer

TALK = [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "and"}, {"role": "assistant", "content": "fine"},
]  # fmt: skip
HEADER = "<|start_header_id|>"
SPECIALS = [
    "<e>",
    HEADER,
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|call|>",
]
ROLE = HEADER + "{{ m.role }}<|end_header_id|>\n\n"
ALWAYS = "{{ '" + HEADER + "assistant<|end_header_id|>\n\n' }}"
SOURCES: dict[str, tuple[str, list[str], set[str]]] = {
    "a generation prompt that nobody asked for (the first Llama 3)": (
        "{% for m in messages %}" + ROLE + "{{ m.content }}<|eot_id|>{% endfor %}" + ALWAYS,
        ["the cat<|eot_id|>", "fine<|eot_id|>"],
        {"<e>", "<|eot_id|>"},
    ),
    "no generation prompt at all": (
        "{% for m in messages %}" + ROLE + "{{ m.content }}<|eot_id|>{% endfor %}",
        ["the cat<|eot_id|>", "fine<|eot_id|>"],
        {"<e>", "<|eot_id|>"},
    ),
    "no end, only headers": (
        "{% for m in messages %}" + ROLE + "{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}" + ALWAYS + "{% endif %}",
        ["the cat", "fine"],
        {"<e>"},
    ),
    "the next role ends a turn (GLM)": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["the cat<|user|>", "fine"],
        {"<e>", "<|user|>"},
    ),
    "line ends that are tokens (Gemma 3)": (
        "{% for m in messages %}" + ROLE + "{{ m.content }}<|eot_id|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + ALWAYS + "{% endif %}",
        ["the cat<|eot_id|>", "fine<|eot_id|>"],
        {"<e>", "<|eot_id|>"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Path:
    """A model whose line ends are added tokens, as Gemma's are."""
    path: Path = make_model(tmp_path_factory.mktemp("facts") / "model", SPECIALS, eos_token="<e>")
    file = Tokenizer.from_file(str(path / "tokenizer.json"))
    file.add_tokens([AddedToken("\n", normalized=False), AddedToken("\n\n", normalized=False)])
    file.save(str(path / "tokenizer.json"))
    return path


def ends(tokenizer: Any) -> set[str]:
    return {tokenizer.decode([index], skip_special=False) for index in tokenizer.eos_ids}


@pytest.mark.parametrize("kind", SOURCES)
def test_answers_end_with_a_special_token_and_never_hold_a_header(model: Path, kind: str) -> None:
    source, spans, found = SOURCES[kind]
    tokenizer = load_tokenizer(model).with_template({"default": source}, "t")
    dataset = load_dataset([{"messages": TALK}, {"messages": TALK[:2]}], tokenizer)
    assert [text for text, trained in dataset.rendered(0) if trained] == spans
    assert ends(tokenizer) == found
    assert dataset.report["no_end_token"] == (0 if spans[-1].endswith("<|eot_id|>") else 2)


def test_an_answer_that_ends_with_a_line_end_keeps_it(model: Path) -> None:
    tokenizer = load_tokenizer(model).with_template({"default": SOURCES["line ends that are tokens (Gemma 3)"][0]}, "t")
    turns = [TALK[0], {"role": "assistant", "content": "the cat\n"}]
    assert load_dataset([{"messages": turns}], tokenizer).rendered(0)[1] == ("the cat\n<|eot_id|>", True)


@pytest.mark.parametrize(
    ("behind", "last", "found"),
    [("<|call|>", "<|call|>", {"<e>", "<|eot_id|>", "<|call|>"}),
     ("", "<|observation|>", {"<e>", "<|user|>", "<|observation|>"})],
)  # fmt: skip
def test_what_ends_a_call_is_an_end_too(model: Path, behind: str, last: str, found: set[str]) -> None:
    """gpt-oss has a token for it, GLM the role of the answer."""
    end = "<|eot_id|>" if behind else ""
    source = (
        "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.q }}{% endfor %}"
        "{% if m.tool_calls %}" + behind + "{% else %}" + end + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = load_tokenizer(model).with_template({"default": source}, "t")
    assert ends(tokenizer) == found
    call = {"type": "function", "function": {"name": "get", "arguments": {"q": "weather"}}}
    turns = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "sun"}]
    dataset = load_dataset([{"messages": [*turns, TALK[1]]}], tokenizer)
    assert [text for text, trained in dataset.rendered(0) if trained] == ["weather" + last, "the cat" + end]


def test_blanks_at_the_end_of_a_prompt_are_the_models(chatml: Any) -> None:
    """In a chat template as in an instruct template: asked and trained with the same tokens."""
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chatml.with_template({"default": source}, "t")
    row = load_dataset([{"messages": TALK}], tokenizer)
    prompt = tokenizer.encode_prompt(TALK[:3])
    assert row[0]["input_ids"][: len(prompt)] == prompt
    assert row[0]["labels"][len(prompt) - 1] == -100
    assert [text for text, trained in row.rendered(0) if trained] == [" the cat<|im_end|>", " fine<|im_end|>"]
    assert tokenizer.render(TALK[:3], add_generation_prompt=True).endswith("assistant: ")


@pytest.mark.parametrize("template", ["GrammarErrorCorrectionTemplate", "grammar", "torchtune.data.SummarizeTemplate"])
@pytest.mark.parametrize("answer", ["the cat", "42", " blank first"])
def test_instruct_prompts_are_trained_as_they_are_asked(chatml: Any, llama: Any, template: str, answer: str) -> None:
    from tt_data.template.prompts import get_instruct_template

    row = {"sentence": "hello", "dialogue": "hello", "output": answer}
    for tokenizer in (chatml, llama):
        dataset = load_dataset([row], tokenizer, template=template)
        ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
        asked = tokenizer.encode_text_prompt(get_instruct_template(template).format(row))
        assert ids[: len(asked)] == asked
        assert labels == [-100] * len(asked) + ids[len(asked) :]


def test_a_prompt_that_makes_one_token_with_its_completion_is_told(chatml: Any) -> None:
    dataset = load_dataset([{"prompt": "hel", "completion": "lo"}, {"prompt": "hello", "completion": " cat"}], chatml)
    (note,) = (note for note in dataset.report["notes"] if "make one token" in note)
    assert "(1 row, the first at rows:0)" in note


def test_a_pair_whose_prompt_makes_tokens_with_its_answers_is_kept_with_one_prompt(chatml: Any) -> None:
    rows = [{"prompt": "hel", "chosen": "lo", "rejected": " cat"}, {"prompt": "the c", "chosen": "at", "rejected": "x"}]
    dataset = load_dataset(rows, chatml)
    assert dataset.report["dropped"] == {}
    for row, given in zip(dataset, rows, strict=True):
        begins = [next(i for i, label in enumerate(row[f"{side}_labels"]) if label != -100)
                  for side in ("chosen", "rejected")]  # fmt: skip
        assert begins[0] == begins[1]
        assert row["chosen_input_ids"][: begins[0]] == row["rejected_input_ids"][: begins[0]]
        for side in ("chosen", "rejected"):
            assert chatml.decode(row[f"{side}_input_ids"]).startswith(given["prompt"] + given[side])


@pytest.mark.parametrize("answers", [{"completion": " cat"}, {"chosen": " cat", "rejected": " dog"}])
def test_a_prompt_that_is_text_is_noted_as_trained_without_the_chat_template(
    chatml: Any, make_model: Any, tmp_path: Path, answers: dict[str, str]
) -> None:
    turns = {"prompt": [{"role": "user", "content": "the"}]}
    turns |= {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
    for row, tokenizer, noted in (
        ({"prompt": "the", **answers}, chatml, True),
        (turns, chatml, False),
        ({"prompt": "the", **answers}, load_tokenizer(make_model(tmp_path / "plain", ["<e>"], eos_token="<e>")), False),
    ):
        notes = load_dataset([row], tokenizer).report["notes"]
        assert [note for note in notes if "without the model's chat template" in note] == (notes if noted else [])
        assert bool(notes) == noted
    assert load_dataset([{"text": "the cat"}], chatml).report["notes"] == []  # no prompt, no turn
    if "completion" in answers:  # a prompt by a template that was asked for
        asked = load_dataset([{"instruction": "the", "output": " cat"}], chatml, template="alpaca")
        assert not any("without the model's" in note for note in asked.report["notes"])


@pytest.mark.parametrize("name", ["Llama2ChatFormat", "torchtune.data.ChatMLFormat", "MistralChatFormat"])
def test_torchtunes_names_are_taken_for_chat_templates(llama: Any, llama_dir: Path, name: str) -> None:
    from tt_data.template.prompts import get_chat_format, our_name

    ours = our_name(name)
    assert (
        load_dataset([{"messages": TALK}], llama, template=name)[0]
        == load_dataset([{"messages": TALK}], llama, template=ours)[0]
    )
    assert load_tokenizer(llama_dir, template=name).templates == load_tokenizer(llama_dir, template=ours).templates
    assert get_chat_format(name) is get_chat_format(ours)


def test_half_a_surrogate_pair_is_our_error(chatml: Any, spm: Any) -> None:
    for tokenizer in (chatml, spm):
        with pytest.raises(ValueError, match=r"half of a surrogate pair in the text \('\\ud800' at character 2\)"):
            tokenizer.encode("a \ud800")
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            tokenizer.encode_text_prompt("\udfff")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        chatml.encode_prompt([{"role": "user", "content": "\ud800"}])
    bad = "a \ud800"
    rows: list[dict[str, Any]] = [
        {"text": bad}, {"prompt": bad, "completion": "x"}, {"prompt": "x", "completion": bad},
        {"messages": [{"role": "user", "content": bad}, TALK[1]]}, {"prompt": "x", "chosen": bad, "rejected": "y"},
        {"instruction": bad, "output": "x"},
    ]  # fmt: skip
    for row in rows:
        good = {key: [TALK[0], TALK[1]] if key == "messages" else f"fine {key}" for key in row}
        report = load_dataset([row, good], chatml).report
        assert report["dropped"] == {"not text": 1}, row
        assert report["problems"][0].startswith("rows:0: half of a surrogate pair in the text ('\\ud800' at character")


def test_an_unknown_id_is_decoded_as_sentencepiece_does(sentencepiece_file: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = load_tokenizer(sentencepiece_file)
    ids = [1, *reference.encode("the cat"), 0, *reference.encode("sat"), 2]
    assert tokenizer.decode(ids) == reference.decode(ids)
    assert "\u2047" in tokenizer.decode(ids)
    with pytest.raises(IndexError):
        tokenizer.decode([reference.get_piece_size()])
