"""The one place where an error becomes what the user sees: one line on stderr per mistake, and an exit code.

0 done, 1 failed while running, 2 wrong use or wrong input, 130 and 143 interrupted.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tt_cli.group import Invocation, nearest_option, wants_color
from tt_train.errors import Interrupted, TrainingError, did_you_mean
from tt_train.redact import redact

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
WRONG = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def run(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run ``command``, report what goes wrong, and return the exit code."""
    invocation = Invocation()
    warnings.showwarning = _show_warning
    try:
        result = command.main(
            args, prog_name="tt", standalone_mode=False, obj=invocation, color=wants_color(sys.stdout)
        )
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else (DONE if stop.code is None else FAILED)
    except Exception as error:
        report(error, invocation)
        return exit_code(error, invocation)
    return result if isinstance(result, int) else DONE


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A line, as for every other thing that is said; the place in the code helps nobody here."""
    if issubclass(category, UserWarning):
        click.echo(f"warning: {_one_line(str(message))}", err=True)


def exit_code(error: Exception, invocation: Invocation) -> int:
    """2 for what the user can mend in the command or its input, 1 for a run that had begun and for our own faults."""
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, click.ClickException):
        return WRONG_INPUT
    return WRONG_INPUT if isinstance(error, WRONG) and invocation.run_dir is None else FAILED


def report(error: Exception, invocation: Invocation) -> None:
    """Write ``error`` to stderr, to stdout as JSON when the verb answers in JSON, and to the log of its run."""
    lines = lines_of(error)
    if invocation.json:
        click.echo(json.dumps({"ok": False, "errors": lines}, indent=2))
    prefix = "" if isinstance(error, Interrupted) else click.style("error:", fg="red", bold=True) + " "
    for line in lines:
        click.echo(prefix + line, err=True, color=wants_color(sys.stderr))
    if isinstance(error, click.ClickException | Interrupted):
        return
    trace = redact("".join(traceback.format_exception(error)))
    if invocation.verbose:
        click.echo(trace, err=True, nl=False)
    if invocation.run_dir is not None:
        log = invocation.run_dir / "train.log"
        with suppress(OSError):  # a full disk may be what went wrong
            keep_traceback(log, trace)
            click.echo(f"the traceback is in {log}", err=True)


def keep_traceback(log: Path, trace: str) -> None:
    """Add ``trace`` to ``log``, unless the recipe has."""
    written = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if trace.rstrip().rsplit("\n", 1)[-1] not in written:
        with log.open("a", encoding="utf-8") as file:
            file.write(trace)


def lines_of(error: Exception) -> list[str]:
    """One line per mistake. An error that names several carries them as ``problems``."""
    if isinstance(error, click.UsageError):
        return [_one_line(_usage(error))]
    if isinstance(error, click.ClickException):
        return [_one_line(error.format_message())]
    problems = getattr(error, "problems", None)
    if isinstance(problems, list) and problems:
        return [_one_line(str(problem)) for problem in problems]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return [_one_line(f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}")]
    text = _one_line(str(error))
    is_ours = type(error) is ConnectionError  # of the hub, with its host; a subclass comes from somewhere below
    if (isinstance(error, (*WRONG, TrainingError, Interrupted)) or is_ours) and text:
        return [text]
    return [f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}, without a message"]


def _usage(error: click.UsageError) -> str:
    text = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        text = f"no option {error.option_name}"
        text += nearest_option(error.option_name, error.ctx.command) if error.ctx else ""
    elif isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Choice):
        given = error.message.partition("'")[2].partition("'")[0]
        option = f"{error.param.opts[-1]}: " if isinstance(error.param, click.Option) else ""
        text = f"{option}{error.message.rstrip('.')}{did_you_mean(given, error.param.type.choices)}"
    elif isinstance(error, click.BadParameter):
        text = text.replace("integer range", "whole number").replace("float range", "number")
    where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return text[:1].lower() + text[1:] + where


def _one_line(text: str) -> str:
    return redact("; ".join(line.strip() for line in text.splitlines() if line.strip()))
