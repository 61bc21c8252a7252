"""The one door to the terminal: what is written to stdout or stderr passes here, and control characters are spelt out.

They come from file names, keys, rows, templates, models, libraries and the hub. Colours and cursor moves of our own
pass: those of rich, whose text is spelt out before it is drawn, and those given to ``say`` as styled.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from tt_ckpt.redaction import redact, redact_data, redact_known, redact_said
from tt_train.records.visible import visible

_COLOR = re.compile(r"(\x1b\[(?:0|1|2|7|31|32|33|36)m)")  # of click.style and tt_data.as_text
_BAR = re.compile(r"\r|\n*(?:\x1b\[A)+\Z")  # tqdm redraws a bar, or moves to another
_LINE = "tt_train.inputs.encoding"  # the only other module that may return to the beginning of its line


class OutputLost(Exception):  # noqa: N818  (what a closed pipe means is for the reader of the exit code)
    """The answer cannot be delivered: stdout is a closed pipe or a full disk."""

    def __init__(self, error: OSError) -> None:
        self.closed = error.errno == errno.EPIPE
        super().__init__(f"standard output: {str(error.strerror or error).lower()}; the output is incomplete")


class Door:
    """A text stream in which control characters are spelt out and secrets are blanked.

    stderr that cannot be written is given up: work does not end because nobody reads about it. stdout carries the
    answer, so there it is an error, ``OutputLost``.
    """

    def __init__(self, stream: TextIO, *, answers: bool) -> None:
        self.raw = stream
        self.answers = answers
        self.lost: OutputLost | None = None
        self.hushed = False  # by -q: of this stream, only warnings and errors

    @property
    def encoding(self) -> str:
        """Not ASCII, even if it is: click would write past this door to a stream that is. Escapes need no more."""
        known = str(self.raw.encoding or "utf-8")
        return "utf-8" if known.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646") else known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def write(self, text: str) -> int:
        """Spelt out and without secrets; what draws the bars of libraries passes, to a terminal."""
        writer = _writer()
        drawn = writer.startswith("tqdm.")
        if drawn and (self.hushed or not self.raw.isatty()):
            return len(text)
        bar = _BAR.match(text)
        own = bar[0] if bar is not None and (drawn or writer == _LINE) else ""
        return self.write_raw(own + visible(redact(text[len(own) :])))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def write_styled(self, text: str) -> None:
        """Rows and names, as ``write_said``, but the colours in it stay."""
        self.write_raw("".join(p if _COLOR.fullmatch(p) else visible(redact_said(p)) for p in _COLOR.split(text)))

    def write_said(self, text: str) -> None:
        """What a row or a model says: spelt out, and only what is a secret in any text is blanked."""
        self.write_raw(visible(redact_said(text)))

    def write_exact(self, text: str) -> None:
        """As it is but for secrets, down to the bytes of file names; on a terminal as ``write_said``."""
        if self.raw.isatty():
            self.write_said(text)
            return
        text = redact_known(text)
        try:
            text.encode(self.raw.encoding or "utf-8")
        except UnicodeEncodeError:
            self._write_bytes(text)
        else:
            self.write_raw(text)

    def _write_bytes(self, text: str) -> None:
        encoding = self.raw.encoding or "utf-8"
        try:
            data = text.encode(encoding, "surrogateescape")
        except UnicodeEncodeError:
            data = text.encode(encoding, "backslashreplace")
        self.flush()
        self._deliver(lambda: self.raw.buffer.write(data))

    def write_raw(self, text: str) -> int:
        if text:
            self._deliver(lambda: self.raw.write(text))
        return len(text)

    def flush(self) -> None:
        self._deliver(self.raw.flush)

    def _deliver(self, write: Callable[[], object]) -> None:
        try:
            if self.lost is None:
                write()
        except OSError as error:
            self.lost = OutputLost(error)
            with suppress(OSError, ValueError):  # so that what is still held back fails no second time, at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.raw.fileno())
        if self.lost is not None and self.answers:
            raise self.lost


def _writer() -> str:
    """The module that writes to the door."""
    name: str = sys._getframe(2).f_globals.get("__name__", "")
    return name


@contextmanager
def guarded() -> Iterator[None]:
    """stdout and stderr lead through the door; libraries, prints, warnings and loggers write to these."""
    before = sys.stdout, sys.stderr
    try:
        sys.stdout = cast(TextIO, _door(sys.stdout, answers=True))
        sys.stderr = cast(TextIO, _door(sys.stderr, answers=False))
        yield
    finally:
        sys.stdout, sys.stderr = before


def _door(stream: TextIO, *, answers: bool) -> Door:
    if isinstance(stream, Door):
        return stream
    if callable(reconfigure := getattr(stream, "reconfigure", None)):
        reconfigure(errors="backslashreplace")  # a terminal without a character shows its escape instead of failing
    return Door(stream, answers=answers)


def say(text: object = "", *, err: bool = False, nl: bool = True, styled: bool = False) -> None:
    """A message: on stdout, or on stderr. ``styled``: it has colours of ours."""
    door = _door(sys.stderr if err else sys.stdout, answers=not err)
    line = f"{text}\n" if nl else str(text)
    if styled:
        door.write_styled(line)
    else:
        door.write(line)
    door.flush()


def tell(text: str) -> None:
    """A line on stderr about what was loaded or written; none if the user asked for quiet."""
    if not is_hushed():
        say(text, err=True)


def tell_rows(lines: Sequence[str]) -> None:
    """``tt_data.summary_lines``: what the rows are, which -q leaves out, then what may be wrong with them."""
    for number, line in enumerate(lines):
        say(line, err=True) if number else tell(line)


def hush() -> None:
    """From now on stderr has warnings and errors only."""
    _door(sys.stderr, answers=False).hushed = True


def is_hushed() -> bool:
    """Whether the user asked for quiet."""
    return isinstance(sys.stderr, Door) and sys.stderr.hushed


def answer(text: object, *, nl: bool = True) -> None:
    """What a script reads of stdout, such as a path or generated text: in a pipe or a file exactly this."""
    door = _door(sys.stdout, answers=True)
    door.write_exact(f"{text}\n" if nl else str(text))
    door.flush()


def is_utf8(stream: TextIO) -> bool:
    """Whether what is written to ``stream`` leaves as UTF-8."""
    raw = stream.raw if isinstance(stream, Door) else stream
    return str(raw.encoding or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")


def print_json(facts: Mapping[str, Any], *, said: Mapping[str, Any] | None = None) -> None:
    """Print ``facts`` as the verb's one JSON object; ``ok`` says that there were no mistakes.

    ``said``: more entries, which are the text of rows or of a model.
    """
    blanked = {"ok": True, **redact_data(dict(facts)), **_said(said or {})}
    text = json.dumps(blanked, indent=2, default=str)
    say(text) if said is None else answer(text)


def _said(value: Any) -> Any:
    if isinstance(value, str):
        return redact_said(value)
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items()}
    return [_said(item) for item in value] if isinstance(value, list | tuple) else value


def wants_color(stream: TextIO) -> bool:
    """Whether to colour what is written to ``stream``: a terminal, unless NO_COLOR; or FORCE_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def open_closed_streams() -> None:
    """A standard stream that the caller has closed is the null device, and not the next file that is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            assert opened == number, "the lowest number that is free"
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
