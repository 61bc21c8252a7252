"""Standard input, output and error that are full, closed, cut off, enormous or not text."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import click
import pytest

from tt_cli import errors, terminal
from tt_cli.group import Verb
from tt_cli.prompts import LONGEST
from tt_cli.terminal import Door, OutputLost, answer, guarded, say
from tt_train.inputs import encoding
from tt_train.records.visible import visible

TT = f"{sys.executable} -m tt_cli"


def bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, env=environment)


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    fake = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", fake)


@pytest.mark.parametrize("words", ["ls", "--help", "--version", "cat sft model.path=m data.train=d"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_does_not_fit_on_the_disk_is_one_line_and_exit_1(words, unbuffered):
    done = bash(f"{TT} {words} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr == "error: standard output: no space left on device; the output is incomplete\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_stdout_any_more_is_exit_141_without_a_word(unbuffered):
    done = bash(f"{TT} ls configs | true; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (141, "")


def test_messages_that_nobody_reads_do_not_end_the_work():
    assert bash(f"{TT} ls runs-of-yesterday 2> /dev/full").returncode == 2
    done = bash(f"{TT} ls recipes 2>&-")
    assert (done.returncode, "sft" in done.stdout) == (0, True)


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_cause_no_traceback(closed, tmp_path):
    done = bash(f"cd {tmp_path}; {TT} ls {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert bash(f"cd {tmp_path}; {TT} generate {closed}").returncode == 2


@pytest.mark.parametrize("locale", [{"LC_ALL": "xx_YY.nothing"}, {"PYTHONIOENCODING": "ascii:strict"},
                                    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])  # fmt: skip
def test_a_broken_locale_shows_escapes(locale, tmp_path):
    setting = " ".join(f"{name}={value}" for name, value in locale.items())
    done = bash(f"cd {tmp_path}; env {setting} {TT} validate $'caf\\u00e9\\x1b[2J\\xff'")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert r"\x1b[2J" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a\nb\xff", "(0xff) is not UTF-8"),
        (b"\xed\xa0\x80", "(0xed) is not UTF-8"),
        (b"a" * (LONGEST + 1), "the prompt is longer than 1 MiB; shorten it"),
        (b"a" * 9000, "can read 128 with the answer; shorten it"),
    ],
    ids=["not text", "half a character", "a flood", "too long"],
)
def test_a_prompt_that_is_not_text_or_too_long_is_one_line(tt, lora_run, monkeypatch, verb, data, said):
    stdin(monkeypatch, data)
    done = tt(verb, str(lora_run), "-q", "--max-new-tokens", "2")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


def test_nul_and_control_characters_in_prompts_are_text(tt, lora_run, monkeypatch):
    stdin(monkeypatch, b"a\0b\x1b[2J")
    assert tt("generate", str(lora_run), "--json", "--max-new-tokens", "2").json["prompt"] == "a\0b\x1b[2J"
    stdin(monkeypatch, b"\xef\xbb\xbf/system \x1b]0;x\x07\nred\0\n\n/exit\nnever")
    done = tt("chat", str(lora_run), "-q", "--max-new-tokens", "2")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("words", [["-p", "a\udcff"], ["-p", "red", "--system", "\ud800"]])
def test_words_that_are_not_utf_8_are_one_line(tt, lora_run, words):
    done = tt("generate", str(lora_run), *words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is not UTF-8; convert the text, for example with iconv" in done.err


def test_two_interrupts_are_exit_130_without_a_traceback(lora_run):
    command = [sys.executable, "-m", "tt_cli", "chat", str(lora_run)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("red\n" * 3)  # more would fill the context, which is wrong input
    process.stdin.flush()
    process.stdout.read(1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err
    assert "Exception" not in err


# ---- the door itself -----------------------------------------------------------------------------------------------


def raising(error: BaseException) -> click.Command:
    @click.command("verb", cls=Verb)
    def verb() -> None:
        raise error

    return verb


def test_everything_that_is_written_is_redacted(capsys):
    @click.command("verb", cls=Verb)
    def verb() -> None:
        click.echo("\x1b[31mechoed")
        print("printed\r\x07")
        print("to stderr \x9b", file=sys.stderr)
        sys.stderr.writelines(["lines \x1b\n"])
        assert logging.lastResort is not None
        logging.lastResort.handle(logging.makeLogRecord({"msg": "logged \x1b[2J", "levelno": logging.ERROR}))
        warnings.warn("warned \u202e", stacklevel=1)
        thread = threading.Thread(target=lambda: print("threaded \x08", file=sys.stderr))
        thread.start()
        thread.join()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert errors.run(verb, []) == 0
    out, err = capsys.readouterr()
    assert out == "\\x1b[31mechoed\nprinted\\r\\x07\n"
    assert err.splitlines() == [
        r"to stderr \x9b",
        r"lines \x1b",
        r"logged \x1b[2J",
        r"warning: warned \u202e",
        r"threaded \x08",
    ]


def test_secrets_are_removed_from_everything_that_is_written(capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse")
    with guarded():
        print("a correct-horse")
        print("b correct-horse", file=sys.stderr)
    assert "correct-horse" not in "".join(capsys.readouterr())


def test_bars_of_tqdm_move_and_their_names_do_not(capsys, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with guarded():
        for _ in tqdm.tqdm(range(2), desc="\x1b[2J\rmodel\x07", position=1, ascii=True):
            pass
        print("\rno bar", file=sys.stderr)
    err = capsys.readouterr().err
    assert "\\x1b[2J\\rmodel\\x07" in err
    assert "\x1b[A" in err
    assert not set(err.replace("\x1b[A", "").replace("\r\\x1b", "").replace("\r ", "")) & {"\x1b", "\x07"}
    assert "\\rno bar" in err


def test_bars_of_tqdm_are_for_a_terminal(capsys):
    tqdm = pytest.importorskip("tqdm")
    with guarded():
        list(tqdm.tqdm(range(2), desc="drawn"))
        print("said", file=sys.stderr)
    assert capsys.readouterr().err == "said\n"


def test_the_line_about_rows_that_are_encoded_replaces_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(encoding, "AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with guarded(), encoding.Encoding() as progress:
        for read in (512, 1024):
            progress(read, lambda: 2000)
    line, end, said = capsys.readouterr().err.removeprefix("\r").split("\r")
    assert line.startswith("encoding rows: 1,024 of 2,000 (")
    assert end.isspace()
    assert said.startswith("encoded 1,024 rows in ")


def test_an_exit_with_a_message_shows_it(capsys):
    assert errors.run(raising(SystemExit("no GPU \x07 here")), []) == 1
    assert capsys.readouterr().err == "error: no GPU \\x07 here\n"


def test_a_broken_pipe_to_a_helper_is_not_taken_for_a_reader_that_has_left(capsys):
    assert errors.run(raising(BrokenPipeError(32, "Broken pipe")), []) == 1
    assert capsys.readouterr().err == "error: BrokenPipeError: [Errno 32] Broken pipe\n"
    assert errors.run(raising(EOFError("the archive ends early")), []) == 1
    assert capsys.readouterr().err.startswith("error: EOFError: the archive ends early\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; close other programs, or use a smaller model or fewer tokens"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
            "out of memory (4096 bytes more was requested); close other programs",
        ),
        (RecursionError("maximum recursion depth exceeded"), "something in the input is nested too deeply"),
    ],
)
def test_memory_and_depth_that_run_out_are_said_in_words(capsys, error, line):
    assert errors.run(raising(error), []) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_an_error_that_cannot_say_itself_is_still_reported(capsys, monkeypatch, tmp_path):
    class Odd(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise RuntimeError("no")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert errors.run(raising(Odd()), []) == 1
    assert capsys.readouterr().err.startswith("error: Odd, without a message\n")


def test_the_exact_bytes_of_an_answer_reach_a_pipe():
    raw = io.BytesIO()
    door = Door(io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace"), answers=True)
    for text in ("\x1b[1m", "\udcff\udc80", "\ud800", "caf\u00e9"):
        door.write_exact(text)
        door.flush()
    assert raw.getvalue() == b"\x1b[1m\xff\x80\\ud800caf\xc3\xa9"


def test_the_first_failure_of_stdout_is_remembered():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    door = Door(Full(), answers=True)
    for write in (lambda: door.write("a"), lambda: say_to(door), door.flush):
        with pytest.raises(OutputLost, match="no space left on device"):
            write()
    quiet = Door(Full(), answers=False)
    quiet.write("a")
    quiet.flush()


def say_to(door: Door) -> None:
    door.write_exact("b")


def test_say_and_answer_need_no_guard(capsys):
    say("a\x1b")
    answer("b\x1b")
    say("\x1b[32mgreen\x1b[0m \x1b[2J\x1b[8m", styled=True)
    assert capsys.readouterr().out == "a\\x1b\nb\x1b\n\x1b[32mgreen\x1b[0m \\x1b[2J\\x1b[8m\n"
    assert terminal.visible is visible


def test_text_of_any_script_is_unchanged():
    text = "tab\t, newline\n, caf\u00e9, \u0645\u06cc\u200c\u062e, \u65e5, \U0001f468\u200d\U0001f469, \u00a0, \ue0b0"
    assert visible(text) == text
    assert (
        visible("\u202ea\u2066\u200f\ufeff\U000e0041\x7f\r\n") == "\\u202ea\\u2066\\u200f\\ufeff\\U000e0041\\x7f\\r\n"
    )
