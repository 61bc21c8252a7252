"""Where a text can be cut so that each part has the tokens that it has in the whole.

A file apart from ``json_file``: plain ASCII text never needs it.
"""

from __future__ import annotations

import re

ODD = re.compile(r"[^\t\n\r -~]")  # what Python's expressions and the library's may see differently
CUT = re.compile(r"[!-~](?= )")  # no known splitting pattern joins these two, or looks back from the second
_MOST_ODD = 8  # an odd character in so many: the library is faster


def has_few_odd(text: str) -> bool:
    """Whether most of ``text`` is plain ASCII."""
    return len(ODD.findall(text)) * _MOST_ODD <= len(text)


def stretches(text: str) -> list[str]:
    """``text`` in parts, of which the second, fourth, ... hold every odd character and the rest of its word. A cut is
    in front of a space that follows something else."""
    parts: list[str] = []
    done = 0
    for match in ODD.finditer(text):
        if match.start() < done:
            continue
        start = text.rfind(" ", done, match.start())
        while start > done and not CUT.match(text, start - 1):
            start = text.rfind(" ", done, start)
        start = max(start, done)
        found = CUT.search(text, match.end())
        end = found.end() if found else len(text)
        parts += (text[done:start], text[start:end])
        done = end
    return [*parts, text[done:]]
