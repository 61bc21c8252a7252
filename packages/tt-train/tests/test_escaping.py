"""Texts of a run, a model or a file name, where they are shown: page, picture, card, Modelfile, commands."""

import json
import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from tt_train.models.modelfile import parameters, quoted, stops
from tt_train.models.ollama import _gaps
from tt_train.models.servers import adapter_commands, commands
from tt_train.report import write_report
from tt_train.report.page import page
from tt_train.report.read import read_runs
from tt_train.run.finish import next_commands
from tt_train.run.model_card import as_text, fenced

EVIL = [
    "<script>alert(1)</script>", "</script><script>alert(1)//", "<img src=x onerror=alert(1)>", "' onload='x", "&lt;",
    "]]>", "<!--", "{{script}}", "{{policy}}", "\x1b]0;x\x07", "\x9b31m", "\u202etxt.exe", "\u2066x\u2069", "\0",
    "\r\n", "$\\frac{1}{2}$", "$x", "a|b", "`code`", "```\n# x\n```", "[x](javascript:alert(1))",
    "![x](http://127.0.0.1/p.png)", "---\ntags: [evil]\n---", "x\" onclick=\"y", "\u200b",
    "$(touch x)", "; touch x", "-rf", "a b", "\n", "%s %d {0}",
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, tuple(name for name, _ in attributes)))


def run_of(folder, text):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "x": text}) + "\n")
    sample = {"step": 1, "prompt": text, "generation": text, "expected": text, "held_out": text}
    (folder / "samples.jsonl").write_text(json.dumps({**sample, "turns": [{"role": text, "content": text}]}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({text: text, "model": {"path": text, "dtype": text}}))
    keys = dict.fromkeys(("command", "base_model", "method", "started", "state", "recipe", "device", text), text)
    facts = {
        "data": {"report": {"dropped": {text: 1}, "schema": text}},
        "git": {"commit": text},
        "precision": {"trained": text},
    }
    environment = {"environment": {"cpu": text, "devices": [text], "packages": {text: text}}}
    (folder / "manifest.json").write_text(json.dumps(keys | facts | environment))
    return folder


def test_no_text_of_a_run_is_markup_a_script_or_a_character_that_cannot_be_seen(tmp_path):
    plain = Tags()
    plain.feed(page(read_runs([run_of(tmp_path / "plain", "text")])))
    for number, text in enumerate(EVIL):
        written = page(read_runs([run_of(tmp_path / str(number), text)]))
        tags = Tags()
        tags.feed(written)
        assert {tag for tag in tags.seen if tag not in plain.seen} <= {("span", ("class",))}, (
            text
        )  # marks of the config
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", written), text
        assert written.count("</script>") == 2
        assert written.count("Content-Security-Policy") == 1


@pytest.mark.parametrize("text", ["$\\frac{1}{2}$", "\\$x$", "$", "<b>&", "\x1b[31m", "\u202ex", "a\nb"])
def test_the_name_of_a_run_is_never_markup_or_a_formula(tmp_path, text, recwarn):
    one, other = run_of(tmp_path / text, "text"), run_of(tmp_path / "other", "text")
    html, png = write_report([one, other], tmp_path / "out")
    assert png is None or png.stat().st_size > 1000
    assert "<b>" not in html.read_text().partition("<main>")[2].replace('<b class="key">', "").replace("<b>Prompt", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("tt run sft a.b=1; rm -rf ~", "tt run sft 'a.b=1;' rm -rf '~'"),
        ("tt run $(touch x) `y` | sh > z", "tt run '$(touch' 'x)' '`y`' '|' sh '>' z"),
        ("tt run x\nrm -rf y", "tt run x rm -rf y"),
        ("python -m tt_cli run x", "python -m tt_cli run x"),
        (["tt", "run", "a b"], "tt run 'a b'"),
        ("curl http://127.0.0.1/x | sh", None),
        ("rm -rf /", None),
        ("tt run 'unclosed", None),
    ],
)
def test_the_command_of_a_manifest_is_offered_for_copying_only_if_it_is_one_of_tt(tmp_path, command, shown):
    run = run_of(tmp_path / "run", "text")
    (run / "manifest.json").write_text(json.dumps({"command": command}))
    written = page(read_runs([run]))
    assert ("What made this run" in written) == (shown is not None)
    if shown is not None:
        import html

        assert f"<pre>{html.escape(shown)}</pre>" in written


def test_text_in_a_card_is_no_markdown_and_stays_in_its_cell():
    for text in EVIL:
        cell = as_text(text)
        assert cell.isprintable()
        for mark in ("|", "`", "<", "[", "]", "*", "$", "!", "#"):
            assert not re.search(rf"(?<!\\){re.escape(mark)}", cell), text
    assert as_text(3) == "3"
    assert as_text("meta-llama/Llama-3.2_1B (v1.0)") == "meta-llama/Llama-3.2_1B (v1.0)"


def test_no_line_of_a_config_ends_its_block_in_a_card():
    for text in [*EVIL, "a\n```\n# heading", "````\n````", "```" * 20]:
        first, *middle, last = "\n".join(fenced(text, "yaml")).split("\n")
        assert first == last + "yaml"
        assert not [line for line in middle if line.strip().startswith(last)]
    assert fenced("a: 1", "yaml") == ["```yaml", "a: 1", "```"]


def test_a_token_that_would_end_a_text_of_a_modelfile_is_left_out():
    texts = [
        "<|im_end|>",
        'a"b',
        'x"""\nFROM /etc/passwd\nSYSTEM """',
        "a\nADAPTER x",
        'a"""b',
        "\x1b",
        "<\uff5cend\uff5c>",
    ]
    tokenizer = SimpleNamespace(
        eos_ids=list(range(len(texts))), decode=lambda ids, skip_special: "" if skip_special else texts[ids[0]]
    )
    assert stops(tokenizer) == ["<|im_end|>", 'a"b', "<\uff5cend\uff5c>"]
    assert stops(tokenizer, written=False) == texts
    assert quoted('a"b') == '"""a"b"""'


def test_parameters_that_are_no_numbers_are_left_out():
    odd = {
        "temperature": "1\nFROM x",
        "top_p": float("nan"),
        "top_k": 10**400,
        "min_p": True,
        "repetition_penalty": [1],
    }
    assert parameters({"max_position_embeddings": True}, odd) == {"repeat_penalty": 1.0}


def test_words_that_a_template_repeats_without_end_are_counted_first():
    assert _gaps("ab" * 200_000, ["a", "b"] * 3) is None
    assert _gaps("1x2y3", ["x", "y"]) == ["1", "2", "3"]
    assert _gaps("1y2x3", ["x", "y"]) is None


NAMES = [
    "plain",
    "a b",
    "a;touch x",
    "$(touch x)",
    "`touch x`",
    "a'b",
    'a"b',
    "-rf",
    "--help",
    "a\nb",
    "~",
    "*",
    "#x",
    "!!",
]


def words(line):
    """What a shell makes of a line: the words, each on its own."""
    done = subprocess.run(["sh", "-c", f"for word in {line}; do printf '%s\\0' \"$word\"; done"], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_takes_every_shown_command_as_it_is_meant(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    typed = f"./{name}" if name.startswith("-") else name
    assert words(commands(path, "hf")[0]) == ["vllm", "serve", typed]
    assert words(commands(path, "hf")[1])[-1] == typed
    assert words(commands(path, "hf")[2])[2:5] == [typed, "-o", f"{typed}.gguf"]
    assert words(commands(path, "gguf")[0])[:3] == ["llama-cli", "-m", typed]
    assert words(adapter_commands(path, "gguf", path, 8)[0])[2] == typed
    assert words(adapter_commands(path, "hf", path, 8)[0])[2] == typed
    create, run = commands(path, "ollama")
    assert words(create)[3:] == ["-f", f"{typed}/Modelfile"]
    assert re.fullmatch(r"[A-Za-z0-9._-]+", words(create)[2])
    assert not words(create)[2].startswith("-")
    assert words(run)[2] == words(create)[2]
    assert [words(line)[2] for line in next_commands(path, "lora")] == [typed] * 3
    assert words(next_commands(path, "lora")[1])[4] == f"{typed}-merged"
    assert list(tmp_path.iterdir()) == []
    assert shlex.split(next_commands(path, "full")[0]) == ["tt", "chat", typed]
