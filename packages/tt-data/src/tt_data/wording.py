"""Text that comes from files, in messages: one line, of limited length, in which nothing commands a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

_LONGEST, _NAMES = 500, 20  # characters of a message; names in a list


def visible(text: str, limit: int = _LONGEST) -> str:
    """``text`` with what cannot be printed as escapes, and cut if it is long."""
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def said(error: object, limit: int = 200) -> str:
    """What an error of a library says, or what kind it is: libraries repeat what files hold."""
    return visible(" ".join(str(error).split()), limit) or type(error).__name__


def names_of(names: Iterable[object]) -> str:
    """``'text', 'id'``: the columns or keys that there are; of many or long ones the first, and how many more."""
    iterator = iter(names)
    first = [repr(visible(str(name), 60)) for name in islice(iterator, _NAMES)]
    more = sum(1 for _ in iterator)
    return (", ".join(first) or "none") + (f" and {more:,} more" if more else "")


def counted(number: int, noun: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that is spelt most like ``name``; None if none is similar."""
    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about ``name``: the nearest of ``known``, or nothing."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near!r}?"
