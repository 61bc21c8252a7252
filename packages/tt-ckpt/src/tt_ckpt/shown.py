"""Text from files as messages show it: short, on one line, without characters that control a terminal."""

import reprlib
from collections.abc import Iterable
from pathlib import PurePath

_LONGEST = 200
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = 4
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 40


def quoted(value: object) -> str:
    """``repr`` of a value from a file: at most 200 characters, all printable."""
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def plain(text: object) -> str:
    """A short printable name, or a path, without quotes; anything else as ``quoted`` shows it."""
    if isinstance(text, PurePath):
        return str(text) if str(text).isprintable() else ascii(str(text))
    if isinstance(text, str) and len(text) <= _LONGEST and text.isprintable():
        return text
    return quoted(text)


def listed(names: Iterable[object], count: int = 3) -> str:
    """The first ``count`` names, and dots if there are more."""
    held = list(names)
    return ", ".join(map(plain, held[:count])) + (", ..." if len(held) > count else "")


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``1,200 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_size(nbytes: int) -> str:
    for unit, size in reversed(UNITS.items()):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return counted(nbytes, "byte")
