"""A chat template comes with a model and may be hostile: RELIABILITY S5 and S7."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tt_data import TemplateError, load_dataset, load_tokenizer
from tt_data.template.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, Job

TURNS = [{"role": "user", "content": "hi"}]

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY') }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'role': 'x'}) %}",
    "{{ range.__class__.__base__.__subclasses__() }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
]
BOMBS = [
    "{{ 'x' * 10**8 }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{{ 'xxxxxxxxxx' * 100 }}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ 7 ** (7 ** 9) }}",
    "{{ '{:>1000000000}'.format('') }}",
    "{{ lipsum(n=100000000) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_template_escapes_the_sandbox(chatml: Any, source: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    tokenizer = chatml.with_template({"default": source.replace("CANARY", str(canary))}, "hostile")
    try:
        text = tokenizer.render(TURNS)
    except TemplateError as refusal:
        text = str(refusal)
    assert "\n" not in text
    assert "root:" not in text
    assert "subclasses" not in text.replace("'__subclasses__'", "")
    assert not canary.exists()


@pytest.mark.parametrize("source", BOMBS)
def test_time_memory_and_output_are_limited(chatml: Any, source: str) -> None:
    tokenizer = chatml.with_template({"default": source}, "hostile")
    begin = time.monotonic()
    with pytest.raises(TemplateError) as refusal:
        tokenizer.render(TURNS)
    assert time.monotonic() - begin < 15  # 1 second of CPU, on a machine that may be busy
    assert "\n" not in str(refusal.value)


def test_limits_hold_in_a_thread_and_the_next_rendering_works(chatml: Any) -> None:
    source = "{% if messages[0].content == 'bomb' %}" + BOMBS[1] + "{% endif %}{{ messages[0].content }}"
    tokenizer = chatml.with_template({"default": source}, "hostile")
    seen: list[str] = []

    def attack() -> None:
        try:
            tokenizer.render([{"role": "user", "content": "bomb"}])
        except TemplateError as refusal:
            seen.append(str(refusal))

    thread = threading.Thread(target=attack)
    thread.start()
    thread.join()
    assert len(seen) == 1
    assert "too long" in seen[0]
    assert tokenizer.render(TURNS) == "hi"


def test_a_killed_process_is_replaced_and_its_row_named(chatml: Any) -> None:
    """A C function that never returns to Python: only the parent can end it."""
    source = "{% set n = messages[0].content | length %}{{ 7 ** (7 ** (3 * n)) if n == 4 }}{{ messages[0].content }}"
    template = ChatTemplate(source, name="hostile")
    conversations = [[{"role": "user", "content": text}] for text in ("a", "bomb", "c")]
    jobs = [Job(json.dumps({"messages": messages, "prompt": False}), 1) for messages in conversations]
    answers = template.run(jobs)
    assert [answer.get("text") for answer in answers] == ["a", None, "c"]
    assert answers[1]["error"]


def test_a_large_template_is_refused_before_it_is_read(chatml: Any) -> None:
    tokenizer = chatml.with_template({"default": "x" * (MAX_TEMPLATE_BYTES + 1)}, "large")
    with pytest.raises(TemplateError, match="at most 65536"):
        tokenizer.render(TURNS)
    assert chatml.with_template({"default": "x" * MAX_TEMPLATE_BYTES}, "large").render(TURNS)


def test_the_rendering_process_sees_no_token_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    given: list[dict[str, str]] = []
    popen = subprocess.Popen

    def note(*words: Any, env: dict[str, str], **options: Any) -> Any:
        given.append(env)
        return popen(*words, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", note)
    ChatTemplate("hi").start()
    assert [("PATH" in seen, "canary" in json.dumps(seen)) for seen in given] == [(True, False)]


def test_code_of_a_model_directory_never_runs(
    tmp_path: Path, make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    canary = tmp_path / "canary"
    config = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    model = make_model(tmp_path / "model", ["<s>"], chat_template="{{ messages[0].content }}", **config)
    for name in ("tokenization_x.py", "modeling_x.py", "jinja2.py", "tt_data.py"):
        (model / name).write_text(f"open({str(canary)!r}, 'w')")
    here = Path.cwd()
    os.chdir(model)
    try:
        assert load_tokenizer(model).render(TURNS) == "hi"
    finally:
        os.chdir(here)
    assert not canary.exists()
    assert "auto_map is ignored" in caplog.text


def test_an_error_in_a_template_names_its_line_and_the_row(chatml: Any) -> None:
    source = "{% for m in messages %}\n{% if m.content == 'x' %}\n{{ raise_exception('no x here') }}{% endif %}"
    source += "{% endfor %}ok"
    tokenizer = chatml.with_template({"default": source}, "strict")
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]} for text in ("a", "x")
    ]
    dataset = load_dataset(rows, tokenizer, train_on="all")
    assert dataset.report["problems"] == ["rows:1: strict, line 3: no x here"]
    with pytest.raises(TemplateError, match="strict, line 1: unexpected"):
        chatml.with_template({"default": "{{ }"}, "strict").render(TURNS)


LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
ON_ROWS = {  # slow on any machine when a row of the data is rendered, though the studies of a template go well
    "a loop": LOOP,
    "a power that Python cannot be stopped in": "{% set n = messages | length + 7 %}{{ 7 ** (7 ** n) }}",
    "memory": "{% for i in range(400) %}{% set n = messages | length * 10**7 %}{% set y = 'x' * n %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
}


@pytest.mark.parametrize("name", ON_ROWS)
def test_a_template_that_is_slow_on_every_row_is_not_tried_on_all_of_them(
    chatml: Any, make_chat_rows: Any, name: str
) -> None:
    source = "{% if messages[0].content.endswith(' 0') %}" + ON_ROWS[name] + "{% endif %}" + chatml.templates["default"]
    with pytest.raises(
        TemplateError, match="hostile: its first .* s longer to render than allowed.*choose a different one"
    ):
        load_dataset(make_chat_rows(20_000), chatml.with_template({"default": source}, "hostile"), max_seq_len=64)


def test_a_template_that_fails_on_one_row_loses_that_row(chatml: Any, make_chat_rows: Any) -> None:
    source = "{% if ' 77 ' in messages[0].content %}" + LOOP + "{% endif %}" + chatml.templates["default"]
    dataset = load_dataset(make_chat_rows(200), chatml.with_template({"default": source}, "hostile"))
    assert dataset.report["dropped"] == {"template": 1}
    assert dataset.report["problems"] == ["rows:77: hostile: the chat template took too long to render"]


def test_a_template_may_write_a_multiple_of_a_conversation_and_no_more(chatml: Any, make_chat_rows: Any) -> None:
    source = "{{ 'x' * 100_000 }}" + chatml.templates["default"]
    with pytest.raises(ValueError, match="20 template.*wrote more than"):
        load_dataset(make_chat_rows(20), chatml.with_template({"default": source}, "hostile"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ " + "not " * 15_000 + "1 }}",
        "{{ 'a'" + "|trim" * 10_000 + " }}",
        "{{ messages" + ".a" * 20_000 + " }}", "{% for a in range(99) %}" * 30 + "{% endfor %}" * 30,
        "{% raw", "{{ '\x1b]0;x\x07' }", "{% extends 'x' %}", "{% block a %}{{ super() }}{% endblock %}",
        "{{ raise_exception('\x1b[31m\u202e') }}",
    ],
)  # fmt: skip
def test_a_template_nested_too_deeply_or_not_finished_is_an_error_of_one_line(chatml: Any, source: str) -> None:
    with pytest.raises(TemplateError) as error:
        chatml.with_template({"default": source}, "hostile").render(TURNS)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


def test_messages_nested_too_deeply_are_refused_by_place(chatml: Any, make_chat_rows: Any) -> None:
    deep: Any = "<|im_end|>"
    for _ in range(450):
        deep = [deep]
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": deep}}}
    row = {"messages": [TURNS[0], {"role": "assistant", "content": "a", "tool_calls": [call]}]}
    with pytest.raises(ValueError, match="rows:2: lists and objects more than 100 deep"):
        load_dataset([*make_chat_rows(2), row], chatml)


def test_the_refusal_of_system_messages_is_found_once(chatml: Any, make_chat_rows: Any) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    rows = [{"messages": [{"role": "system", "content": "x"}, *row["messages"]]} for row in make_chat_rows(3)]
    tokenizer = chatml.with_template({"default": source + chatml.templates["default"]}, "strict")
    dataset = load_dataset([*make_chat_rows(1), *rows], tokenizer)
    assert dataset.report["dropped"] == {"system message refused": 3}
