"""What a person at a terminal sees: each test runs ``tt`` on a pseudo-terminal and reads its screen."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Screen:
    """``tt`` on a pseudo-terminal of its own."""

    def __init__(self, *args: str, cwd: Path, **variables: str) -> None:
        self.fd, theirs = pty.openpty()
        self.text = ""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tt_cli", *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def wait_for(self, pattern: str, *, seconds: float = 90) -> str:
        """What was shown since the last call, up to ``pattern``."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, self.text
            assert self._read(), f"ended before {pattern!r}: {self.text}"
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown

    def end(self) -> tuple[int, str]:
        """The exit code, and what was shown since the last call."""
        while self._read():
            pass
        return self.process.wait(timeout=30), self.text

    def _read(self) -> bool:
        ready, _, _ = select.select([self.fd], [], [], 0.2)
        if not ready:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.text += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)


@pytest.fixture
def screen(lora_run) -> Iterator[type[Screen]]:
    opened: list[Screen] = []

    def on_screen(*args: str, cwd: Path = lora_run.parents[1], **variables: str) -> Screen:
        opened.append(Screen(*args, cwd=cwd, **variables))
        return opened[-1]

    yield on_screen  # type: ignore[misc]
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.fd)


def test_a_run_shows_facts_a_bar_a_table_and_the_next_commands(screen, model_dir, rows_file, tmp_path):
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "batch_size=4", "max_steps=4"]
    code, text = screen("run", "sft", *words, "-o", "out", cwd=tmp_path).end()
    assert code == 0
    assert "8 alpaca rows" in text
    assert "\x1b[32mred<|im_end|>\x1b[0m" in text
    assert "step 4/4" in text
    assert re.search(r"training loss +\d\.\d{4} \(.*; \d\.\d{4} at first\)", re.sub(r"\x1b\[\d*m", "", text))
    assert "tt chat out" in text
    assert text.rstrip().endswith("\nout")


def test_no_color_leaves_no_colour_on_the_screen(screen, model_dir, rows_file, tmp_path):
    words = [f"model.path={model_dir}", f"data.train={rows_file}", "model.dtype=fp32", "max_steps=1"]
    code, text = screen("run", "sft", *words, cwd=tmp_path, NO_COLOR="1").end()
    assert code == 0
    assert not re.search(r"\x1b\[(3\d|9\d|[34]8;)", text)
    assert "\u27e6red" in text


def test_chat_on_a_terminal_answers_commands_and_remembers_until_exit(screen):
    chat = screen("chat", "--max-new-tokens", "4")
    assert "runs/one; /help" in chat.wait_for("> ")
    chat.type("Repeat the word red.")
    assert chat.wait_for("\n> ").count("\n") >= 2
    chat.type("/exti")
    assert "no command /exti; did you mean '/exit'?" in chat.wait_for("\n> ")
    chat.type("/xyz")
    assert "no command /xyz; /help lists them" in chat.wait_for("\n> ")
    chat.type("/help")
    shown = chat.wait_for("\n> ")
    assert "/reset" in shown
    assert max(map(len, shown.splitlines())) < 80
    chat.type("/reset")
    assert "(a new conversation)" in chat.wait_for("\n> ")
    chat.type("/exit")
    assert chat.end()[0] == 0


@pytest.mark.parametrize(("columns", "left_out"), [(60, True), (200, False)])
def test_a_list_of_runs_leaves_columns_out_before_it_breaks_its_lines(screen, columns, left_out):
    code, text = screen("ls", "runs", COLUMNS=str(columns)).end()
    lines = text.splitlines()
    assert code == 0
    assert max(map(len, [line for line in lines if "narrow" not in line])) <= columns
    assert ("left out, since the terminal is narrow: CHANGED, " in text) == left_out
    assert ("CHANGED" in next(line for line in lines if line.startswith("PATH"))) != left_out


def test_the_end_of_input_ends_the_chat(screen):
    chat = screen("chat")
    chat.wait_for("> ")
    os.write(chat.fd, b"\x04")
    code, text = chat.end()
    assert code == 0
    assert "Traceback" not in text


def test_a_conversation_that_is_too_long_can_be_reset(screen):
    chat = screen("chat", "--max-new-tokens", "4")
    chat.wait_for("> ")
    chat.type("red " * 150)
    assert "/reset forgets" in chat.wait_for("\n> ")
    chat.type("red")
    assert "/reset forgets" not in chat.wait_for("\n> ")


def test_generate_without_a_prompt_asks_for_one_instead_of_waiting(screen):
    code, text = screen("generate").end()
    assert code == 2
    assert 'no prompt: tt generate RUN "TEXT", or -p TEXT' in text
