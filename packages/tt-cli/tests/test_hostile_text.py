"""Escape sequences and the like, out of every place that ``tt`` shows, are spelt out on a terminal."""

import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tt_cli.main import main

CLEAR, TITLE, COLUMN = "\x1b[2J", "\x1b]0;PWNED\x07", "\x9b31m"
HOSTILE = f"{CLEAR}{TITLE}{COLUMN}\x08\x1b]52;c;cHduZWQ=\x1b\\\u202e\u2066[red]:smile:[link=http://x]"
SPELT = r"\x1b[2J\x1b]0;PWNED\x07\x9b31m\x08\x1b]52;c;cHduZWQ=\x1b\\u202e\u2066[red]:smile:[link=http://x]"
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[12]?K|\x1b\[1?A|\x1b\[\?2004[lh]|\r\n|\r(?=\x1b|\r|$)")
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

Shown = Callable[..., str]


@pytest.fixture
def shown(lora_run: Path) -> Shown:
    """What ``tt WORDS`` shows on a terminal of its own, with stdout elsewhere if ``out`` is given."""

    def call(*words: str, cwd: Path, code: int | None = None, typed: bytes = b"", columns: int = 100) -> str:
        child, fd = pty.fork()
        if child == 0:
            status = 99
            try:
                os.chdir(cwd)
                os.environ.update(TERM="xterm", COLUMNS=str(columns))
                for number, name in enumerate(("stdin", "stdout", "stderr")):
                    setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))
                sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
                status = main(list(words))
                sys.stdout.flush()
            finally:
                os._exit(status)
        os.write(fd, typed)
        written = _read(child, fd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(fd)
        text = written.decode("utf-8", "backslashreplace")
        assert "Traceback" not in text, text
        assert code is None or status == code, text
        assert not (found := BAD.search(OURS.sub("\n", text))), (found, text)
        return text

    return call


def _read(child: int, fd: int) -> bytes:
    written, until = b"", time.monotonic() + 90
    while time.monotonic() < until:
        if not select.select([fd], [], [], 0.5)[0]:
            continue
        try:
            piece = os.read(fd, 65536)
        except OSError:  # Linux: the other side is closed
            return written
        if not piece:
            return written
        written += piece
    os.kill(child, signal.SIGKILL)
    raise AssertionError(f"it did not end: {written!r}")


def flat(text: str) -> str:
    """Without the line ends of a narrow terminal."""
    return re.sub(r"\s+", "", OURS.sub("", text.replace("\r\n", "\n")))


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def own_model(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def own_run(lora_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora_run, tmp_path / "runs" / "one"))


def test_the_name_of_a_data_file(shown, model_dir, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"train{HOSTILE.replace('/', '')}.jsonl").write_text("{broken\n")
    text = shown("data", "show", "data", "--tokenizer", str(model_dir), cwd=tmp_path, code=2)
    assert flat(f"train{SPELT.replace('/', '')}.jsonl") in flat(text)


def test_text_and_columns_of_rows(shown, model_dir, tmp_path):
    row = {"instruction": HOSTILE + "\rover\tit", "output": "red"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    text = shown("data", "show", "rows.jsonl", "--tokenizer", str(model_dir), cwd=tmp_path, code=0)
    assert flat(SPELT + r"\rover it") in flat(text)
    assert "\x1b[32mred" in text
    text = shown("data", "show", "rows.jsonl", "--tokenizer", str(model_dir), "--stats", cwd=tmp_path, code=0)
    (tmp_path / "odd.jsonl").write_text(json.dumps({HOSTILE: "a", "b": "c"}) + "\n")
    text = shown("data", "show", "odd.jsonl", "--tokenizer", str(model_dir), cwd=tmp_path, code=2)
    assert "PWNED" in text


@pytest.mark.parametrize("key", ["quantization_config", "architectures", "model_type", HOSTILE])
def test_a_key_or_value_of_a_models_config(shown, own_model, rows_file, tmp_path, key):
    value = {"quantization_config": {"quant_method": HOSTILE}, "architectures": [HOSTILE]}.get(key, HOSTILE)
    edited(own_model / "config.json", **{key: value})
    shown("validate", "sft", "model.path=model", f"data.train={rows_file}", cwd=tmp_path)
    shown("generate", "model", "red", "--max-new-tokens", "2", cwd=tmp_path)
    shown("convert", "model", "out", cwd=tmp_path)


def test_a_key_of_an_adapters_config_and_its_base(shown, own_run, tmp_path):
    config = own_run / "adapter" / "adapter_config.json"
    edited(config, **{"x" + HOSTILE: 1})
    for words in (("generate", "runs/one", "red"), ("merge", "runs/one", "out"), ("export", "runs/one", "out")):
        assert "PWNED" in shown(*words, cwd=tmp_path, code=2)


def test_keys_and_values_of_a_yaml_file_and_of_words(shown, tmp_path):
    (tmp_path / "c.yaml").write_text('recipe: sft\n"a\\e]0;PWNED\\a[red]": 1\nmodel: {path: "\\e[2J:smile:"}\n')
    assert flat(r"a\x1b]0;PWNED\x07[red]") in flat(shown("validate", "c.yaml", cwd=tmp_path, code=2))
    shown("cat", "c.yaml", cwd=tmp_path, code=2)
    (tmp_path / "d.yaml").write_text('recipe: sft\nmodel: {path: "\\e[2J[red]"}\ndata: {train: "x\\u202e"}\n')
    shown("cat", "d.yaml", cwd=tmp_path, code=0)
    for words in (
        ("validate", HOSTILE),
        ("run", "sft", f"{HOSTILE}=1"),
        ("run", "sft", f"model.path={HOSTILE}", f"data.train={HOSTILE}"),
        ("run", "sft", "--config", HOSTILE),
        ("run", f"--{HOSTILE}"),
        (HOSTILE,),
        ("cp", HOSTILE, "x"),
        ("merge", HOSTILE, HOSTILE),
        ("report", HOSTILE),
        ("verify", HOSTILE),
        ("chat", HOSTILE),
        ("data", "show", HOSTILE, "--tokenizer", HOSTILE),
        ("convert", HOSTILE, "x"),
        ("upload", HOSTILE, HOSTILE),
        ("download", HOSTILE),
    ):
        text = shown(*words, cwd=tmp_path, code=2)
        assert "PWNED" in text, words


def test_names_and_manifests_of_runs(shown, own_run, tmp_path):
    name = HOSTILE.replace("/", "")
    edited(own_run / "manifest.json", base_model=HOSTILE, recipe=HOSTILE)
    own_run.rename(own_run.with_name(name))
    text = shown("ls", "runs", cwd=tmp_path, code=0)
    assert flat(SPELT.replace("/", "")) in flat(text)
    text = shown("report", f"runs/{name}", cwd=tmp_path, code=0)
    assert flat(SPELT.replace("/", "") + "/report.html") in flat(text)


def test_the_message_of_a_chat_template(shown, own_model, rows_file, tmp_path):
    template = "{{ raise_exception('" + HOSTILE.replace("\\", "\\\\") + "') }}"
    edited(own_model / "tokenizer_config.json", chat_template=template)
    assert "PWNED" in shown("data", "show", str(rows_file), "--tokenizer", "model", cwd=tmp_path, code=2)
    edited(own_model / "tokenizer_config.json", chat_template="{{ messages." + HOSTILE + " }}")
    shown("data", "show", str(rows_file), "--tokenizer", "model", cwd=tmp_path, code=2)


def test_tokens_of_a_tokenizer(shown, own_model, rows_file, tmp_path):
    settings = json.loads((own_model / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token["content"] = HOSTILE
    settings["model"]["vocab"][HOSTILE] = settings["model"]["vocab"].pop("<|im_end|>")
    (own_model / "tokenizer.json").write_text(json.dumps(settings))
    edited(own_model / "tokenizer_config.json", eos_token=HOSTILE)
    shown("data", "show", str(rows_file), "--tokenizer", "model", cwd=tmp_path)
    shown("validate", "sft", "model.path=model", f"data.train={rows_file}", cwd=tmp_path)
    edited(own_model / "tokenizer_config.json", eos_token="x" + HOSTILE)
    shown("data", "show", str(rows_file), "--tokenizer", "model", cwd=tmp_path)


def test_what_a_model_says_even_if_a_sequence_comes_in_pieces(shown, lora_run, monkeypatch):
    from tt_data import Tokenizer

    said = ["a", "\x1b", "]0;PW", "NED\x07", "\r", "b\nc\td", "\x1b[A", "\u202e", "\u20ac", "\n", "x" * 5000]
    monkeypatch.setattr("tt_models.stream_rows", lambda *_, **__: ((0, 90 + i) for i in range(len(said))))
    monkeypatch.setattr(Tokenizer, "decode", lambda _, ids: "".join(said[i - 90] for i in ids))
    expected = "a\\x1b]0;PWNED\\x07\\rb\r\nc\td\\x1b[A\\u202e\u20ac\r\n" + "x" * 5000
    where = lora_run.parents[1]
    assert expected in shown("generate", "runs/one", "red", cwd=where, code=0)
    assert expected in shown("chat", "runs/one", cwd=where, code=0, typed=b"red\n/exit\n")


def test_generated_text_in_a_pipe_is_exactly_what_the_model_says(tt, lora_run, monkeypatch):
    from tt_data import Tokenizer

    said = ["\x1b[31m", "\r", "\u202e[red]:smile:", "hf_" + "a" * 30]
    monkeypatch.setattr("tt_models.stream_rows", lambda *_, **__: ((0, 90 + i) for i in range(len(said))))
    monkeypatch.setattr(Tokenizer, "decode", lambda _, ids: "".join(said[i - 90] for i in ids))
    assert tt("generate", str(lora_run), "red").out == "".join(said) + "\n"


def test_a_run_on_a_terminal_of_any_width(shown, own_model, tmp_path):
    rows = [{"instruction": HOSTILE, "output": CLEAR + "red"}] * 4
    name = HOSTILE.replace("/", "")
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train={name}.jsonl", "model.path=model", "model.dtype=fp32", "adapter.rank=2", "max_steps=2"]
    for columns in (1, 100):
        text = shown("run", "sft", *words, "-o", f"r{columns}", cwd=tmp_path, code=0, columns=columns)
        assert flat(SPELT) in flat(text)
        assert not BAD.search((tmp_path / f"r{columns}" / "train.log").read_text())


@pytest.mark.parametrize("verb", [("verify",), ("merge", "--dry-run")])
def test_other_verbs_on_a_hostile_folder(shown, lora_run, tmp_path, verb):
    name = HOSTILE.replace("/", "")
    shutil.copytree(lora_run, tmp_path / name)
    shown(*verb, name, *(["out"] if verb[0] == "merge" else []), cwd=tmp_path)
    shown("convert", f"{name}/adapter", "out", cwd=tmp_path, code=2)
    shown("env", cwd=tmp_path, code=0)
