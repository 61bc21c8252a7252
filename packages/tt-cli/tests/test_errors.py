"""Errors as the user meets them: lines, exit codes, JSON, logs, tracebacks."""

import warnings
from pathlib import Path

import click
import pytest

from tt_cli import errors
from tt_cli.group import Invocation, Verb, pass_invocation
from tt_cli.options import json_option
from tt_cli.terminal import print_json
from tt_train.errors import ConfigError, Interrupted, TrainingError


def raising(error: BaseException) -> click.Command:
    @click.command("verb", cls=Verb)
    @json_option
    def verb(as_json: bool) -> None:
        raise error

    return verb


MISTAKES = [
    (ValueError("rank must be positive,\n  got 0"), "rank must be positive,; got 0"),
    (FileNotFoundError(2, "No such file or directory", "rows.jsonl"), "rows.jsonl: no such file or directory"),
    (PermissionError(13, "Permission denied", "/root"), "/root: permission denied"),
    (click.UsageError("Give one of the two."), "give one of the two (see tt --help)"),
]


@pytest.mark.parametrize(("error", "line"), MISTAKES, ids=lambda value: type(value).__name__)
def test_a_mistake_of_the_user_is_one_line_and_exit_2(error, line, capsys):
    assert errors.run(raising(error), []) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_every_problem_of_a_config_error_has_a_line_of_its_own(capsys):
    assert errors.run(raising(ConfigError(["a: unknown key", "b: expected a number\nor null"])), []) == 2
    assert capsys.readouterr().err == "error: a: unknown key\nerror: b: expected a number or null\n"


def test_a_fault_of_ours_names_its_type_and_exits_1(capsys):
    assert errors.run(raising(KeyError("loss", "hf_" + "a" * 24)), []) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: KeyError: ('loss', '")
    assert second.startswith("this is a fault in tt; please report it with the traceback in ")
    log = Path(second.rpartition(" ")[2])
    trace = log.read_text()
    assert "Traceback (most recent call last)" in trace
    assert "hf_aaa" not in first + trace
    assert log.stat().st_mode & 0o077 == 0
    log.unlink()


def test_a_hub_that_does_not_answer_exits_1_in_the_words_of_the_hub(capsys):
    assert errors.run(raising(ConnectionError("a/b: hub.example gives no answer")), []) == 1
    assert capsys.readouterr().err == "error: a/b: hub.example gives no answer\n"
    assert errors.run(raising(ConnectionResetError("reset")), []) == 1
    assert capsys.readouterr().err == "error: ConnectionResetError: reset\n"


def test_a_failed_run_exits_1_without_the_name_of_the_type(capsys):
    assert errors.run(raising(TrainingError("loss is nan at step 3")), []) == 1
    assert capsys.readouterr().err == "error: loss is nan at step 3\n"


def test_an_interrupted_run_exits_with_128_plus_its_signal(capsys):
    assert errors.run(raising(Interrupted(15, "runs/a/checkpoints/step-000003", 3)), []) == 143
    assert capsys.readouterr().err.startswith("stopped by SIGTERM after step 3")
    assert errors.run(raising(KeyboardInterrupt()), []) == 130


def test_v_shows_the_traceback(capsys):
    errors.run(raising(ValueError("no")), ["-v"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_with_json_the_mistakes_are_in_the_json_too(capsys):
    assert errors.run(raising(ConfigError(["one", "two"])), ["--json"]) == 2
    out, err = capsys.readouterr()
    assert out == '{\n  "ok": false,\n  "errors": [\n    "one",\n    "two"\n  ]\n}\n'
    assert err == "error: one\nerror: two\n"


def test_with_json_a_mistake_in_the_options_is_in_the_json_too(capsys):
    assert errors.run(raising(ValueError()), ["--jsn", "--json"]) == 2
    assert "did you mean '--json'" in capsys.readouterr().out


def test_without_json_stdout_is_silent_on_failure(capsys):
    errors.run(raising(ValueError("no")), [])
    assert capsys.readouterr().out == ""


def failing_after_start(run_dir) -> click.Command:
    @click.command("verb", cls=Verb)
    @pass_invocation
    def verb(invocation: Invocation) -> None:
        invocation.run_dir = run_dir
        raise ValueError("hf_" + "a" * 24)

    return verb


def test_once_a_run_has_begun_its_log_keeps_the_traceback_and_a_value_error_is_a_failure(tmp_path, capsys):
    assert errors.run(failing_after_start(tmp_path), []) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert str(tmp_path / "train.log") in err
    assert "Traceback (most recent call last)" in (tmp_path / "train.log").read_text()


def test_a_token_is_in_no_error_and_in_no_log(tmp_path, capsys):
    errors.run(failing_after_start(tmp_path), ["-v"])
    assert "hf_aaa" not in capsys.readouterr().err + (tmp_path / "train.log").read_text()


def test_an_answer_is_ok(capsys):
    @click.command("verb", cls=Verb)
    @json_option
    def verb(as_json: bool) -> None:
        print_json({"rows": 3})

    assert errors.run(verb, ["--json"]) == 0
    assert capsys.readouterr().out == '{\n  "ok": true,\n  "rows": 3\n}\n'


def test_an_error_is_red_on_a_terminal_unless_no_color(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    errors.run(raising(ValueError("no")), [])
    assert "\x1b[31m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    errors.run(raising(ValueError("no")), [])
    assert "\x1b" not in capsys.readouterr().err


def test_a_warning_is_a_line_without_a_place_in_the_code(capsys):
    @click.command("verb", cls=Verb)
    def verb() -> None:
        warnings.warn("rank 9 is\nabove 8", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert errors.run(verb, []) == 0
        assert capsys.readouterr().err == "warning: rank 9 is; above 8\n"
