"""``tt generate --prompts``: rows in, rows out, in their order, as one by one."""

import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tt_cli.prompts import read_prompts, row_file
from tt_cli.verbs import generate
from tt_train.errors import ConfigError

MIXED = [
    {"id": "first", "prompt": "Repeat the word red."},
    {"id": 2, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "blue"}]},
    {"text": "Repeat the words red, blue, green, black, white, brown, pink and grey."},
    {"prompt": "red \u20ac \U0001f600"},
]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("words", [(), ("--temperature", "1.5", "--seed", "3", "--num-samples", "2")])
def test_a_file_of_prompts_is_answered_as_one_by_one(tt, lora_run, tmp_path, words):
    prompts, out = write(tmp_path / "prompts.jsonl", *MIXED), tmp_path / "answers.jsonl"
    options = ("--max-new-tokens", "9", *words)
    done = tt("generate", str(lora_run), "--prompts", prompts, "-o", str(out), *options)
    assert (done.code, done.out) == (0, ""), done.err
    rows = answers(out.read_text())
    samples = 2 if words else 1
    assert [row["line"] for row in rows] == [line for line in (1, 2, 3, 4) for _ in range(samples)]
    assert [row["id"] for row in rows][::samples] == ["first", 2, None, None]
    assert rows[0]["prompt"] == MIXED[0]["prompt"]
    assert rows[2 * samples]["prompt"] == MIXED[2]["text"]
    assert f"{4 * samples} answers to 4 prompts in {out}" in done.err
    assert "per second" in done.err
    alone = tt("generate", str(lora_run), "--prompts", prompts, "--batch-size", "1", *options)
    assert answers(alone.out) == rows
    first = tt("generate", str(lora_run), "-p", MIXED[0]["prompt"], "--json", *options).json
    assert [sample["text"] for sample in first["samples"]] == [row["text"] for row in rows[:samples]]


def test_lines_of_text_are_prompts_and_the_answers_go_into_a_pipe(tt, lora_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Repeat red.\n\n  \nRepeat blue.\n"))
    done = tt("generate", str(lora_run), "--prompts", "-", "--max-new-tokens", "3")
    assert [(row["line"], row["prompt"]) for row in answers(done.out)] == [(1, "Repeat red."), (4, "Repeat blue.")]


def test_broken_lines_are_named_before_weights_load(tt, lora_run, tmp_path, monkeypatch):
    monkeypatch.setattr("tt_train.load", lambda *_, **__: pytest.fail("weights load"))
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "red"}, '{"prompt": "red",,}\n', "[1]\n", {"id": 3}, {"prompt": ""}, {"prompt": 5},
        {"prompt": "a", "text": "b"}, {"messages": []}, {"messages": [{"role": "usr", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, '"\\ud800"\n',
        '{"prompt": "\\ud800"}\n',
    )  # fmt: skip
    done = tt("generate", str(lora_run), "--prompts", prompts)
    lines = done.err.splitlines()
    assert (done.code, done.out, len(lines)) == (2, "", 11)
    for number, said in zip(range(2, 12), (
        "column 18: ", "expected an object", "expected one of prompt, text and messages, got only 'id'",
        "prompt must be a text that is not empty", "prompt must be a text", "got prompt and text", "messages",
        "did you mean 'user'", "the last message is the assistant's", "expected an object",
    ), strict=True):  # fmt: skip
        assert f"{prompts}, line {number}" in lines[number - 2]
        assert said in lines[number - 2]
    assert "1 more line like these" in lines[-1]


def test_a_prompt_that_does_not_fit_has_an_error_in_its_place_and_the_others_are_answered(tt, lora_run, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "red"}, {"id": 5, "prompt": "red " * 300}, {"prompt": "b"})
    done = tt("generate", str(lora_run), "--prompts", prompts, "--max-new-tokens", "2", "--json")
    assert (done.code, done.json["ok"]) == (1, False)
    assert (done.json["prompts"], done.json["answers"], done.json["failed"]) == (3, 2, 1)
    assert "can read 128 with the answer" in done.json["rows"][1]["error"]
    assert [row.get("finish") is not None for row in done.json["rows"]] == [True, False, True]
    assert "1 of 3 prompts has no answer; the rows say why" in done.err


def test_keys_that_are_not_used_are_told(tt, lora_run, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "red", "completion": "red", "temperature": 0.5})
    done = tt("generate", str(lora_run), "--prompts", prompts, "--max-new-tokens", "2")
    assert "'completion' is not used (1 row)" in done.err
    assert "'temperature' is not used (1 row)" in done.err


@pytest.mark.parametrize(("words", "said"), [
    (("--prompts", "{p}", "-p", "red"), "another prompt; give only one of them"),
    (("-o", "out.jsonl", "-p", "red"), "-o is for the answers to --prompts"),
    (("--prompts", "{p}", "-o", "{p}"), "already there"),
    (("--prompts", "{p}x"), "no such file"),
    (("--prompts", "{p}", "--num-samples", "2"), "at temperature 0 all answers are the same"),
    (("--prompts", "{p}", "--top-p", "0.5"), "--top-p has no effect at temperature 0"),
    (("--prompts", "{p}", "--system", "Be brief."), "has a system message of its own"),
    (("--prompts", "{p}", "--raw"), "messages need the chat template"),
    (("--prompts", "{e}"), "no prompts; write one per line"),
    (("-p", " "), "the prompt is empty"),
])  # fmt: skip
def test_what_does_not_go_together_is_one_line(tt, lora_run, tmp_path, words, said):
    prompts, empty = write(tmp_path / "prompts.jsonl", *MIXED), write(tmp_path / "empty.jsonl", "\n")
    done = tt("generate", str(lora_run), *(word.format(p=prompts, e=empty) for word in words))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err


def test_the_settings_of_the_model_are_followed_and_told(
    tt, lora_run, train_run, write_tiny_model, rows_file, tmp_path
):
    model = write_tiny_model(tmp_path / "model")
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "stop_strings": ["red"], "typical_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(settings))
    options = ("generate", str(model), "-p", "red", "--json", "--max-new-tokens", "4", "--seed", "1")
    done = tt(*options)
    assert done.json["sampling"] == {
        "max_new_tokens": 4, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.0,
        "stop": ["red"], "seed": 1,
    }  # fmt: skip
    assert "generation_config.json: temperature 1.5, top_k 50, top_p 0.9, stop ('red',)" in done.err
    assert "not supported, no effect here: typical_p=0.9" in done.err
    greedy = tt(*options, "--temperature", "0", "--stop", "x")
    assert (greedy.json["sampling"]["temperature"], greedy.json["sampling"]["stop"]) == (0, ["x"])
    (model / "generation_config.json").write_text('{"do_sample": true, "top_p": "many"}')
    wrong = tt(*options)
    assert wrong.code == 2
    assert "generation_config.json: top_p: expected a number from 0 to 1, got 'many'" in wrong.err


@pytest.mark.parametrize(("text", "said"), [
    ('{"prompt": "a", "id": NaN}', "line 1: id: NaN and infinity are not JSON"),
    ('{"prompt": "a", "id": [1e999]}', "line 1: id: NaN and infinity are not JSON"),
    ('{"prompt": "a", "id": "\\udcff"}', "line 1: id: character 2 is not UTF-8"),
    ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "line 1: has a number of too many digits"),
    ('{"prompt": "a", "prompt": "b"}', "line 1: 'prompt' is there twice; leave one out"),
    ('[\n {"prompt": "a"}\n]', "line 1: JSON of several lines is not read; write each object on a line of its own"),
    ('{\n "prompt": "a"\n}', "line 1: JSON of several lines is not read"),
    ('[{"prompt": "a"}, {"prompt": "b"}]', "line 1: expected an object"),
])  # fmt: skip
def test_what_could_not_be_written_again_or_is_not_one_object_per_line_is_named(tmp_path, text, said):
    path = tmp_path / "prompts"  # no suffix: the first line decides
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_prompts(str(path))
    assert said in str(caught.value.problems[0])


def test_a_table_is_refused_and_a_line_in_brackets_is_a_prompt(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,id\na,1\n")
    with pytest.raises(ValueError, match="a table is not read here"):
        read_prompts(str(tmp_path / "rows.csv"))
    (tmp_path / "prompts").write_text("[INST] red [/INST]\n")
    assert read_prompts(str(tmp_path / "prompts"))[0].content == "[INST] red [/INST]"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_rows_on_standard_output_are_json_in_every_encoding(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with row_file(None) as write:
        write({"text": "\xe9 \u4e2d \U0001f600"})
    assert json.loads(stream.buffer.getvalue().decode(encoding)) == {"text": "\xe9 \u4e2d \U0001f600"}


def test_after_ctrl_c_the_file_has_every_answer_so_far_and_they_are_counted(tt, lora_run, tmp_path, monkeypatch):
    def stopped(asker, jobs, answered=generate._Asker._replies):
        if jobs[0][0] == 1:
            raise KeyboardInterrupt
        return answered(asker, jobs)

    monkeypatch.setattr(generate._Asker, "_replies", stopped)
    prompts, out = write(tmp_path / "prompts.jsonl", {"prompt": "red red"}, {"prompt": "a"}), tmp_path / "answers.jsonl"
    words = ("generate", str(lora_run), "--prompts", prompts, "-o", str(out), "--max-new-tokens", "2")
    done = tt(*words, "--batch-size", "1")
    assert [row["line"] for row in answers(out.read_text())] == [1]
    assert (done.code, f"1 answer to 2 prompts in {out}" in done.err) == (130, True), done.err


def test_no_bar_folds_the_rows_on_a_terminal(monkeypatch):
    made = []
    monkeypatch.setattr("tt_cli.console.count_progress", lambda *words: made.append(words) or nullcontext(print))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for shown, terminal in ((False, True), (False, False), (True, True)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        with generate._progress(3, shown=shown):
            pass
    assert made == [("prompts", 3)] * 2


def test_without_an_answer_no_file_is_left(tt, lora_run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("broken weights")

    monkeypatch.setattr("tt_train.load", broken)
    prompts, out = write(tmp_path / "prompts.txt", "red"), tmp_path / "answers.jsonl"
    done = tt("generate", str(lora_run), "--prompts", prompts, "-o", str(out))
    assert (done.code, out.exists()) == (2, False)
    assert f"in {out}" not in done.err


@pytest.mark.parametrize(("words", "said"), [
    (("--temperature", "1e-300"), "1e-5 to 1e5, got 1e-300"),
    (("--stop", ""), "--stop: an empty text"),
    (("--num-samples", "1000000000", "--temperature", "1"), "--num-samples"),
    (("--prompts", "{p}", "-o", "{d}"), "a folder; name a new file in it"),
    (("--prompts", "{p}", "-o", "/dev/null"), "not a regular file; name a new file, or leave out -o"),
])  # fmt: skip
def test_options_out_of_bounds_are_told_before_weights_load(tt, lora_run, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("tt_train.load", lambda *_, **__: pytest.fail("weights load"))
    prompts = write(tmp_path / "prompts.txt", "red")
    asked = () if "--prompts" in words else ("-p", "red")
    done = tt("generate", str(lora_run), *asked, *(word.format(p=prompts, d=tmp_path) for word in words))
    assert (done.code, done.out, said in done.err) == (2, "", True), done.err


def test_without_a_template_parts_are_one_text_and_a_prompt_without_tokens_has_an_error_in_its_place(
    tt, write_tiny_model, tmp_path
):
    model = write_tiny_model(tmp_path / "plain", chat_template=None)
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "blue"}]
    prompts = write(
        tmp_path / "prompts.jsonl", {"messages": [{"role": "user", "content": parts}]}, {"prompt": "red blue"}
    )
    first, second = answers(tt("generate", str(model), "--prompts", prompts, "--max-new-tokens", "3").out)
    assert (first["text"], first["prompt_tokens"]) == (second["text"], second["prompt_tokens"])
    empty = write_tiny_model(
        tmp_path / "empty", chat_template="{% if messages[0].content != 'red' %}{{ messages[0].content }}{% endif %}"
    )
    done = tt("generate", str(empty), "--prompts", write(tmp_path / "two", "red\nblue\n"), "--max-new-tokens", "3")
    first, second = answers(done.out)
    assert (done.code, "the prompt has no tokens" in first["error"], second["finish"]) == (1, True, "length")
