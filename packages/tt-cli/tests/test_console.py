"""What a run shows: plain lines in a pipe, rich on a terminal."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from tt_cli.console import LineConsole, TerminalConsole, console_here, duration, summary_rows
from tt_train.run.console import RunFacts

FACTS = RunFacts(
    model="tiny",
    method="lora",
    parameters=1_234_567,
    trainable=12_345,
    data=["1,040 alpaca rows; dropped: 7 empty; truncated: 4; held out: 50 of them", "rows.jsonl:12: not JSON"],
    steps_total=20,
    device="cpu",
    dtype="bf16",
    run_dir="runs/one",
    sample=[("2+2? [not a tag] ", False), ("4", True)],
)
ROW = {"step": 5, "loss": 1.5, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 1234.5, "eta_s": 125.0}
SUMMARY = {
    "run_dir": "runs/one",
    "steps": 20,
    "loss_first": 3.0,
    "loss_last": 1.25,
    "loss_over": "last epoch",
    "tokens_per_s": 120.0,
    "eval_loss": 1.5,
    "seconds": 62.0,
    "tokens": 6200,
    "next": ["tt chat runs/one", "tt merge runs/one -o model"],
}


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(file=io.StringIO(), force_terminal=True, width=100, highlight=False, color_system="standard")


def shown(terminal: Terminal) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def told(terminal: Terminal, facts: RunFacts = FACTS) -> str:
    console = TerminalConsole(terminal)
    console.start(facts)
    console.step(ROW)
    console.end(SUMMARY)
    return shown(terminal)


def test_before_step_1_a_terminal_shows_parameters_rows_and_the_sample_in_colour(terminal):
    text = told(terminal)
    assert "1,234,567 parameters, 12,345 trained (1.00 %, lora)" in text
    assert "1,040 alpaca rows; dropped: 7 empty; truncated: 4; held out: 50 of them" in text
    assert "warning: \x1b[0mrows.jsonl:12: not JSON" in text
    assert "2+2? [not a tag] \x1b[32m4\x1b[0m" in text


def test_without_colour_the_sample_has_marks(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = told(Terminal(file=io.StringIO(), force_terminal=True, width=100))
    assert "2+2? [not a tag] \u27e64\u27e7" in text
    assert "\x1b[3" not in text


def test_the_bar_counts_steps_and_shows_the_eta_of_the_whole_run(terminal):
    text = told(terminal)
    assert "step 5/20" in text
    assert "loss 1.5000" in text
    assert "2m05s left" in text


def test_a_resumed_run_begins_where_it_stopped(terminal):
    console = TerminalConsole(terminal)
    console.start(replace(FACTS, step_first=7))
    console.close()
    assert "step 7/20" in (text := shown(terminal))
    assert "continued after step 7" in text


def test_an_evaluation_stays_on_the_screen(terminal):
    console = TerminalConsole(terminal)
    console.start(FACTS)
    console.step({**ROW, "eval_loss_news": 1.5, "eval_loss": 1.75, "eval_perplexity": 5.75, "eval_exact_match": 0.5})
    console.close()
    line = "step 5: held-out loss 1.7500, perplexity 5.7500, exact match 0.5000, loss_news 1.5000"
    assert line in shown(terminal)


def test_the_end_has_the_figures_of_each_named_set():
    sets = {"news": {"loss": 1.25, "perplexity": 3.49}, "code": {"loss": None}}
    rows = summary_rows({**SUMMARY, "eval_perplexity": 4.4817, "eval_exact_match": 0.5, "eval_sets": sets})
    assert rows[2:6] == [
        ("held-out loss", "1.5000"), ("  news", "1.2500"), ("perplexity", "4.482"), ("exact match", "0.5000")
    ]  # fmt: skip


def test_the_end_is_a_table_and_the_next_commands(terminal):
    text = told(terminal)
    assert "1.2500 (last epoch; 3.0000 at first)" in text
    assert text.rstrip().endswith("tt merge runs/one -o model\x1b[0m")


def test_closing_gives_the_cursor_back_and_may_be_repeated(terminal):
    console = TerminalConsole(terminal)
    console.start(FACTS)
    assert "\x1b[?25l" in shown(terminal)
    console.close()
    console.close()
    assert shown(terminal).rstrip().endswith("\x1b[?25h")


def test_long_text_of_a_note_is_not_wrapped(terminal):
    TerminalConsole(terminal).warn("x" * 300)
    assert "x" * 300 in shown(terminal)


@pytest.mark.parametrize("width", [50, 60, 80])
def test_a_narrow_terminal_tears_no_line_of_progress_and_no_word(width):
    terminal = Terminal(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    console = TerminalConsole(terminal)
    console.start(replace(FACTS, steps_total=2000, run_dir="quick/runs/pretrain"))
    console.step(ROW | {"step": 1640, "tokens_per_s": 2684.0, "eta_s": 136.0})
    console.end(SUMMARY)
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown(terminal)).replace("\r", "\n").splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("run   "))
    end = next(number for number, line in enumerate(lines) if line.startswith("step 0/2000"))
    assert max(map(len, lines[place:end])) <= width
    assert " ".join(" ".join(lines[place:end]).split()).startswith("run quick/runs/pretrain, on cpu, forward pass in ")
    assert any(line.startswith("step 1640/2000") for line in lines)
    assert "left" not in {line.strip() for line in lines}


@pytest.mark.parametrize(("width", "shown"), [(60, 0), (104, 1), (300, 4)])
def test_a_line_of_progress_has_room_for_its_step(width, shown):
    """Named figures are left out from the end if the terminal is narrow: ``step 5/20`` was ``ste...``."""
    screen = io.StringIO()
    console = TerminalConsole(Terminal(file=screen, force_terminal=True, width=width, color_system=None))
    console.start(replace(FACTS, data=[]))
    figures = {"rewards_chosen": 0.25, "rewards_rejected": 0.5, "rewards_margin": 0.125, "rewards_accuracy": 1.0}
    console.step(ROW | {"tokens_per_s": 12345.6} | figures)
    console.progress.refresh()
    console.close()
    text = screen.getvalue()
    assert "step 5/20" in text
    assert [name in text for name in ("accuracy", "margin", "chosen", "rejected")] == [i < shown for i in range(4)]


def test_figures_that_a_run_does_not_have_are_left_out():
    rows = dict(summary_rows({"run_dir": "r", "steps": 0, "loss_first": None, "loss_last": None, "eval_loss": None}))
    assert rows == {"steps": "0", "run": "r"}


def test_tokens_per_second_are_over_the_whole_run():
    assert dict(summary_rows(SUMMARY))["trained tokens"] == "6,200 (120 per second)"


def test_a_pipe_gets_plain_lines_and_the_run_directory_is_known_once_it_began(capsys):
    console = console_here()
    assert type(console) is LineConsole
    assert console.run_dir is None
    console.start(FACTS)
    console.step(ROW)
    console.end(SUMMARY)
    console.close()
    out, err = capsys.readouterr()
    assert console.run_dir == Path("runs/one")
    assert out == ""
    assert "\x1b" not in err
    assert "\u27e64\u27e7" in err
    assert "training loss  1.2500 (last epoch; 3.0000 at first)\n" in err
    assert err.endswith("  tt merge runs/one -o model\n")


def test_a_terminal_gets_rich(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Screen())
    assert isinstance(console_here(), TerminalConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert type(console_here()) is LineConsole


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "7s"), (125, "2m05s"), (3599.7, "1h00m"), (90061, "25h01m")])
def test_durations(seconds, text):
    assert duration(seconds) == text
