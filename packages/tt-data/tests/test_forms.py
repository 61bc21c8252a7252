"""Conversations in the form that a template reads, and what it does not write of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tt_data import TemplateError, load_dataset

ASK = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "the cat"}
SYSTEM = {"role": "system", "content": "be nice"}
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOTH = PARTS.replace(
    "{% for part", "{% if m.content is string %}{{ m.content }}{% else %}{% for part", 1
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>", 1)  # fmt: skip
FIRST_PART = "{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}"


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "get", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **more}


def loaded(tokenizer: Any, source: str, turns: list[dict[str, Any]], **row: Any) -> Any:
    return load_dataset([{"messages": turns, **row}], tokenizer.with_template({"default": source}, "t"))


def trained(dataset: Any) -> str:
    return "".join(text for text, flag in dataset.rendered(0) if flag)


def whole(dataset: Any) -> str:
    return "".join(text for text, _ in dataset.rendered(0))


def as_parts(turn: dict[str, Any], *texts: str) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": text} for text in texts or (turn["content"],)]}


@pytest.mark.parametrize("source", [PARTS, BOTH])
@pytest.mark.parametrize("turns", [[ASK, ANSWER], [as_parts(ASK), as_parts(ANSWER)], [ASK, as_parts(ANSWER)]])
def test_parts_and_text_reach_a_template_that_reads_parts(
    chatml: Any, source: str, turns: list[dict[str, Any]]
) -> None:
    dataset = loaded(chatml, source, turns)
    assert trained(dataset) == "the cat<|im_end|>"
    assert "hello" in whole(dataset)
    assert not dataset.report["notes"]
    tokenizer = chatml.with_template({"default": source}, "t")
    assert tokenizer.render(turns[:1], add_generation_prompt=True).endswith("hello<|im_end|>\n<|im_start|>assistant\n")


def test_parts_become_text_for_a_template_that_would_print_the_list(chatml: Any) -> None:
    source = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    dataset = loaded(chatml, source, [as_parts(ASK), as_parts(ANSWER, "the ", "cat")])
    assert whole(dataset) == "hello<|im_end|>the cat<|im_end|>"


def test_parts_that_a_template_would_leave_out_are_joined(chatml: Any) -> None:
    dataset = loaded(chatml, FIRST_PART, [as_parts(ASK), as_parts(ANSWER, "the ", "cat")])
    assert whole(dataset) == "hello<|im_end|>the cat<|im_end|>"
    assert not dataset.report["notes"]


TEXT, OBJECT = '{"q":  "argval"}', {"q": "argval"}
WRITES = {
    "puts text together": "{{ 'call ' + c.function.arguments }}",
    "needs an object": "call {% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    "writes JSON": "call {{ c.function.arguments | tojson }}",
    "takes both": "call {% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
    "adds braces to text": "call {% if c.function.arguments is string %}{{ '{' + c.function.arguments + '}' }}"
    "{% else %}{% for k, v in c.function.arguments.items() %}{{ '{' + k + ':' + v + '}' }}{% endfor %}{% endif %}",
}
WANTED = {
    "puts text together": {"text": TEXT, "object": '{"q": "argval"}'},
    "needs an object": {"text": "q=argval", "object": "q=argval"},
    "writes JSON": {"text": '{"q": "argval"}', "object": '{"q": "argval"}'},  # not once more escaped
    "takes both": {"text": TEXT, "object": '{"q": "argval"}'},
    "adds braces to text": {"text": "{q:argval}", "object": "{q:argval}"},
}


@pytest.mark.parametrize("form", ["text", "object"])
@pytest.mark.parametrize("kind", WRITES)
def test_arguments_are_given_as_they_are_or_in_the_form_that_the_template_takes(
    chatml: Any, kind: str, form: str
) -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + WRITES[kind] + "{% endfor %}{{ m.content }}"
    turns = [ASK, call(TEXT if form == "text" else OBJECT), {"role": "tool", "content": "result"}, ANSWER]
    dataset = loaded(chatml, source + "<|im_end|>{% endfor %}", turns)
    assert whole(dataset).split("<|im_end|>")[1] == "call " + WANTED[kind][form]
    assert not dataset.report["notes"]


def test_a_prompt_takes_the_same_form_as_training(chatml: Any) -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + WRITES["puts text together"]
    tokenizer = chatml.with_template({"default": source + "{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"}, "t")
    turns = [ASK, call(OBJECT), {"role": "tool", "content": "result"}, ANSWER]
    assert tokenizer.render(turns).startswith(tokenizer.render(turns[:3], add_generation_prompt=True))


LOSSES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "reasoning": ([ASK, {**ANSWER, "reasoning_content": "one two"}], "the reasoning of some turns"),
    "thinking": ([ASK, {**ANSWER, "thinking": "one two"}], "the reasoning of some turns"),
    "short reasoning": ([ASK, {**ANSWER, "reasoning": "the cat"}], "the reasoning of some turns"),
    "calls": ([ASK, call(OBJECT), {"role": "tool", "content": "x"}, ANSWER], "tool_calls"),
    "calls without arguments": ([ASK, call({}), {"role": "tool", "content": "x"}, ANSWER], "tool_calls"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_a_template_does_not_write_is_counted_by_kind(chatml: Any, kind: str) -> None:
    turns, lost = LOSSES[kind]
    dataset = load_dataset([{"messages": turns}, {"messages": [ASK, ANSWER]}], chatml)
    (note,) = [n for n in dataset.report["notes"] if "does not write" in n]
    assert note == f"the chat template does not write {lost} (1 row, the first at rows:0)"


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}", "words of some"),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endfor %}", "some results of tools"),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}", "the reasoning of"),
        ("{% for m in messages %}{{ m.content[:20] }}<|im_end|>{% endfor %}", "words of some messages"),
    ],
)
def test_words_and_results_and_thoughts_are_missed_too(chatml: Any, source: str, lost: str) -> None:
    """The system text is found elsewhere in the row, so that it is not enough to look for it."""
    answer = {"role": "assistant", "content": "<think>why not</think>be nice to the cat"}
    turns = [SYSTEM, {"role": "user", "content": "be nice"}, call(OBJECT), {"role": "tool", "content": "nice"}, answer]
    notes = loaded(chatml, source, turns).report["notes"]
    assert [note for note in notes if f"does not write {lost}" in note], notes


def test_a_plain_conversation_has_no_note(chatml: Any, make_chat_rows: Any) -> None:
    rows = [*make_chat_rows(3, turns=3), {"messages": [SYSTEM, ASK, {**ANSWER, "reasoning_content": "  "}]}]
    rows.append({"messages": [ASK, {"role": "assistant", "content": "  a long answer with\nblanks at its end \n"}]})
    assert load_dataset(rows, chatml).report["notes"] == []


def test_a_turn_of_which_only_the_end_is_left_is_not_trained(chatml: Any) -> None:
    turns = [ASK, call(OBJECT), {"role": "tool", "content": "x"}, ANSWER]
    dataset = load_dataset([{"messages": turns}], chatml)
    assert trained(dataset) == "the cat<|im_end|>"
    assert any("removes the text of some turns" in note for note in dataset.report["notes"])
    with pytest.raises(ValueError, match="1 no trainable token"):
        load_dataset([{"messages": turns[:2]}], chatml)


def test_the_cure_is_named_if_a_template_refuses_a_system_message(chatml: Any) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = chatml.with_template({"default": source + PARTS}, "t")
    cure = "not supported; this template takes no system message: put its text at the beginning of the first user turn"
    with pytest.raises(TemplateError, match=cure):
        tokenizer.render([SYSTEM, ASK])
    with pytest.raises(ValueError, match=cure):
        load_dataset([{"messages": [SYSTEM, ASK, ANSWER]}], tokenizer)
    with pytest.raises(TemplateError) as refusal:
        chatml.with_template({"default": "{{ raise_exception('never') }}"}, "t").render([SYSTEM, ASK])
    assert "system message" not in str(refusal.value)


@pytest.mark.parametrize("source", [
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls %}"
    "{{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>{% endfor %}",
    "{% for m in messages %}{{ m.role }}{% if m.content.startswith('x') %}x{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}",
    "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.arguments | tojson }}{% else %}"
    "{{ '' + m.content }}{% endif %}<|im_end|>{% endfor %}",
])  # fmt: skip
@pytest.mark.parametrize("null", [{"content": None}, {}])
def test_calls_without_words_reach_templates_that_want_text_or_null(
    chatml: Any, source: str, null: dict[str, Any]
) -> None:
    turn = {key: value for key, value in call(OBJECT).items() if key != "content"} | null
    dataset = loaded(chatml, source, [ASK, turn, {"role": "tool", "content": "rain"}, ANSWER])
    assert "argval" in trained(dataset)
    assert "None" not in whole(dataset)
    assert not [note for note in dataset.report["notes"] if "tool_calls" in note]


@pytest.mark.parametrize("result", [{"rain": 3, "wind": None}, [{"rain": 3}], 3, True])
def test_results_that_are_no_text_are_written_as_json(chatml: Any, result: Any) -> None:
    source = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}get argval{% endif %}<|im_end|>{% endfor %}"
    dataset = loaded(chatml, source, [ASK, call(OBJECT), {"role": "tool", "content": result}, ANSWER])
    assert f"{json.dumps(result)}<|im_end|>" in whole(dataset)
    assert trained(dataset).endswith("the cat<|im_end|>")


def test_a_row_of_which_nothing_can_be_trained_says_why_and_blames_no_length(chatml: Any) -> None:
    source = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    rows = [{"messages": [ASK, call(OBJECT)]}]
    with pytest.raises(ValueError, match="removes the text of some turns") as error:
        load_dataset(rows, chatml.with_template({"default": source}, "t"), max_seq_len=64)
    assert "max_seq_len" not in str(error.value)
