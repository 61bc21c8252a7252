"""A chat template comes with a model and may be hostile: RELIABILITY S5 and S7."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tt_data import TemplateError, load_dataset, load_tokenizer
from tt_data.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, Job

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
def test_the_sandbox_holds(chatml: Any, source: str, tmp_path: Path) -> None:
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
    jobs = [Job({"messages": messages, "prompt": False}, 1) for messages in conversations]
    answers = template.run(jobs)
    assert [answer.get("text") for answer in answers] == ["a", None, "c"]
    assert answers[1]["error"]


def test_a_large_template_is_refused_before_it_is_read(chatml: Any) -> None:
    tokenizer = chatml.with_template({"default": "x" * (MAX_TEMPLATE_BYTES + 1)}, "large")
    with pytest.raises(TemplateError, match="at most 65536"):
        tokenizer.render(TURNS)
    assert chatml.with_template({"default": "x" * MAX_TEMPLATE_BYTES}, "large").render(TURNS)


def test_the_rendering_process_sees_no_token_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from tt_data.trial import bare_environment

    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    assert "canary" not in json.dumps(bare_environment())


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
