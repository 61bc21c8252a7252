"""The one place where an error becomes what the user sees: one line on stderr per mistake, and an exit code.

0 done, 1 failed while running, 2 wrong use or wrong input, 130 and 143 interrupted, 141 nobody reads stdout any more.
"""

import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tt_ckpt.redaction import redact
from tt_cli.group import Invocation
from tt_cli.terminal import OutputLost, guarded, say, wants_color
from tt_train.errors import WRONG, Interrupted, LostRank, ShownElsewhere, TrainingError, did_you_mean, log_name
from tt_train.records.visible import visible

DONE, FAILED, WRONG_INPUT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
_LONGEST = 1000  # characters of a path in a message
_TAIL = 1_000_000  # bytes of a log in which a traceback is looked for


def run(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run ``command``, report what goes wrong, and return the exit code."""
    with guarded():
        try:
            code = _reported(command, args)
            sys.stdout.flush()  # here a full disk is still an error that can be reported
            return code
        except OutputLost as lost:
            if not lost.closed:
                say(f"error: {lost}", err=True)
            return UNREAD if lost.closed else FAILED


def _reported(command: click.Command, args: Sequence[str] | None) -> int:
    invocation = Invocation()
    warnings.showwarning = _show_warning
    try:
        result = _invoke(command, args, invocation)
    except (click.Abort, KeyboardInterrupt):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, while all is closed, is no traceback
        say("interrupted", err=True)
        return INTERRUPTED
    except OutputLost:
        raise
    except SystemExit as stop:
        if isinstance(stop.code, str):
            say(f"error: {_one_line(stop.code)}", err=True)
        return stop.code if isinstance(stop.code, int) else (DONE if stop.code is None else FAILED)
    except Exception as error:
        return _failed(error, invocation)
    return result if isinstance(result, int) else DONE


def _invoke(command: click.Command, args: Sequence[str] | None, invocation: Invocation) -> Any:
    """As click's ``main``, which would take a helper's broken pipe for stdout's, and an EOFError for Ctrl-D."""
    if "_TT_COMPLETE" in os.environ:
        from tt_cli.completion import register

        register()
        return command.main(args, prog_name="tt", standalone_mode=False)
    words = sys.argv[1:] if args is None else list(args)
    try:
        # color: click takes no control characters out; the door spells them out
        with command.make_context("tt", words, obj=invocation, color=True) as ctx:
            return command.invoke(ctx)
    except click.exceptions.Exit as stop:
        return stop.exit_code


def _failed(error: Exception, invocation: Invocation) -> int:
    report(error, invocation)
    return exit_code(error, invocation)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A line, as for every other thing that is said; the place in the code helps nobody here."""
    if issubclass(category, UserWarning):
        say(f"warning: {_one_line(str(message))}", err=True)


def exit_code(error: Exception, invocation: Invocation) -> int:
    """2 for what the user can fix in the command or its input, 1 for a run that had begun and for our own faults."""
    if isinstance(error, Interrupted | ShownElsewhere):
        return error.exit_code
    if isinstance(error, click.ClickException):
        return WRONG_INPUT
    is_wrong = isinstance(error, WRONG) or getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP)
    return WRONG_INPUT if is_wrong and invocation.run_dir is None else FAILED


def report(error: Exception, invocation: Invocation) -> None:
    """Write ``error`` to stderr, to stdout as JSON when the verb answers in JSON, and to the log of its run."""
    lines = [f"rank {invocation.rank}: {line}" if invocation.rank else line for line in lines_of(error)]
    keep_for_launcher(error, lines, exit_code(error, invocation))
    if isinstance(error, ShownElsewhere):
        _answer_in_json(lines, invocation)
        return
    prefix = click.style("error:", fg="red", bold=True) if wants_color(sys.stderr) else "error:"
    for line in lines:
        if not isinstance(error, Interrupted):
            say(f"{prefix} ", err=True, nl=False, styled=True)
        say(line, err=True)
    if not isinstance(error, click.ClickException | Interrupted):
        _show_trace(error, invocation)
    _answer_in_json(lines, invocation)


def _answer_in_json(lines: list[str], invocation: Invocation) -> None:
    """The one object of a verb that failed, if it is to answer in JSON; of several ranks, the first answers."""
    if invocation.json and not invocation.rank:
        run = {} if invocation.run_dir is None else {"run": str(invocation.run_dir)}
        say(json.dumps({"ok": False, "errors": lines, **run}, indent=2))


def keep_for_launcher(error: Exception, lines: list[str], code: int) -> None:
    """Tell the process that started this rank what went wrong: in the file that torchrun asks for, and as it reads it.

    https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    if not (place := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return
    said = {"message": "; ".join(lines), "errorCode": code, "extraInfo": {"timestamp": str(int(time.time())),
            "py_callstack": ""}}  # fmt: skip
    quiet = isinstance(error, Interrupted | ShownElsewhere)
    ours = {"lines": [] if quiet else lines, "lost": isinstance(error, LostRank), "code": code}
    with suppress(OSError):
        Path(place).write_text(json.dumps({"message": said, "tt": ours}), encoding="utf-8")


def _show_trace(error: Exception, invocation: Invocation) -> None:
    trace = _trace(error)
    if invocation.verbose:
        say(trace, err=True, nl=False)
    with suppress(OSError, ValueError):  # a full disk may be what went wrong, or a log that is a link
        if invocation.run_dir is not None:
            log = invocation.run_dir / log_name(invocation.rank)
            keep_traceback(log, trace)
            say(f"the traceback is in {log}", err=True)
        elif not _is_expected(error):
            say(f"this is a fault in tt; please report it with the traceback in {_new_log(trace)}", err=True)


def _trace(error: Exception) -> str:
    try:
        return visible(redact("".join(traceback.format_exception(error))))
    except Exception as another:  # an error whose text cannot be made
        return f"{type(error).__name__} (its traceback: {type(another).__name__})\n"


def _new_log(trace: str) -> str:
    """A file for the eyes of this user alone."""
    number, name = tempfile.mkstemp(prefix="tt-", suffix=".log")
    with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(trace)
    return name


def _is_expected(error: Exception) -> bool:
    """Whether ``error`` is about the input or the machine, and its line says all."""
    if isinstance(error, (*WRONG, TrainingError, OSError)) or _is_out_of_memory(error):
        return True
    return isinstance(error, ImportError) and error.name is not None and not error.name.startswith("tt_")


def _is_out_of_memory(error: Exception) -> bool:
    text = _text(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def _text(error: Exception) -> str:
    """``str(error)``, also of an error that cannot say it."""
    try:
        return str(error)
    except Exception:
        return ""


def keep_traceback(log: Path, trace: str) -> None:
    """Add ``trace`` to ``log``, unless the recipe has."""
    from tt_ckpt import files

    written = b""
    if log.exists():
        with files.regular(log).open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            written = file.read(_TAIL)
    if trace.rstrip().rsplit("\n", 1)[-1].encode("utf-8", "backslashreplace") not in written:
        files.append_text(log, trace)


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
        name = str(error.filename) if len(str(error.filename)) < _LONGEST else f"{str(error.filename)[:100]}..."
        return [_one_line(f"{name}: {error.strerror[0].lower()}{error.strerror[1:]}")]
    if _is_out_of_memory(error) and not isinstance(error, TrainingError):
        asked = re.search(r"tried to allocate ([\d.]+ ?\w*)", _text(error))
        more = f" ({asked[1]} more was requested)" if asked else ""
        return [f"out of memory{more}; close other programs, or use a smaller model or fewer tokens"]
    if isinstance(error, RecursionError):
        return ["something in the input is nested too deeply to be read (RecursionError)"]
    text = _one_line(_text(error))
    # of the hub, with its host; a subclass, or one with a number, comes from somewhere below
    is_ours = type(error) in (ConnectionError, OSError) and getattr(error, "errno", None) is None
    if (isinstance(error, (*WRONG, TrainingError, Interrupted)) or is_ours) and text:
        return [text]
    return [f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}, without a message"]


def _usage(error: click.UsageError) -> str:
    text = error.format_message().rstrip(".")
    if isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Choice):
        words = error.param.type.choices
        given = error.message.partition("'")[2].partition("'")[0]
        option = f"{error.param.opts[-1]}: " if isinstance(error.param, click.Option) else ""
        text = f"{option}{error.message.rstrip('.')}{did_you_mean(given, words)}"
        if isinstance(error, click.MissingParameter):  # it has no message
            text = f"missing {error.param.human_readable_name}: one of {', '.join(map(repr, words))}"
    elif isinstance(error, click.BadParameter):
        text = text.replace("integer range", "whole number").replace("float range", "number")
    elif "extra argument" in text and error.ctx and any(one.name == "question" for one in error.ctx.command.params):
        text += "; put a prompt of several words in quotes"
    where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return text[:1].lower() + text[1:] + where


def _one_line(text: str) -> str:
    return redact("; ".join(line.strip() for line in text.splitlines() if line.strip()))
