"""Text and ids with spans: which parts are control tokens, and which parts are trained."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

Span = tuple[int, int]
BLANKS = " \t"  # at the end of a prompt they make one token with the word that follows


@dataclass(slots=True)
class MarkedText:
    """``text`` with spans of characters ``[start, end)``, which ascend. ``trained``: the parts that give loss.
    ``controls``: the control tokens that a template wrote; None if every control string in it is one. ``notes``: see
    ``Encoded``."""

    text: str
    trained: list[Span] = field(default_factory=list)
    controls: list[Span] | None = None
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Encoded:
    """Token ids, and which of their spans ``[start, end)`` are trained. ``notes``: what of the row the ids do not
    contain, or not as the row has it; ``report["notes"]`` counts them."""

    ids: list[int]
    trained: list[Span] = field(default_factory=list)
    notes: tuple[str, ...] = ()


class AddedTokens:
    """Finds the tokens of ``added`` in a text: those of ``control`` only where a template wrote them."""

    def __init__(self, added: Collection[str], control: Collection[str]) -> None:
        self._any = alternatives(added)
        self._typed = alternatives(token for token in added if token not in control)

    def spans(self, row: MarkedText) -> list[Span]:
        """Their characters, ascending."""
        if row.controls is None:
            return [match.span() for match in self._any.finditer(row.text)]
        found: list[Span] = []
        position = 0
        for start, end in [*row.controls, (len(row.text), len(row.text))]:
            found += [match.span() for match in self._typed.finditer(row.text, position, start)]
            found += [(start, end)] if start < end else []
            position = end
        return found


def token_spans(characters: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """The tokens that contain a character of each of ``spans``. ``characters``: those of each token, ascending."""
    starts, ends = [a for a, _ in characters], [b for _, b in characters]
    return join_spans([(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans])


def substitute(text: str, edits: Sequence[tuple[int, int, str]], spans: Sequence[Span]) -> tuple[str, list[Span]]:
    """Replace ``text[a:b]`` by a string for each edit (ascending, disjoint), and move ``spans`` along."""
    pieces: list[str] = []
    ends: list[int] = []
    shifts = [0]
    position = 0
    for start, end, new in edits:
        pieces += (text[position:start], new)
        position = end
        ends.append(end)
        shifts.append(shifts[-1] + len(new) - (end - start))
    pieces.append(text[position:])
    moved = [(a + shifts[bisect_right(ends, a)], b + shifts[bisect_right(ends, b)]) for a, b in spans]
    return "".join(pieces), moved


def alternatives(strings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of ``strings``, the longest first. It finds nothing if there are none."""
    ordered = sorted(set(filter(None, strings)))
    try:
        return re.compile(_branches(ordered, 0, len(ordered), 0) or r"(?!)")
    except RecursionError:  # hundreds of strings, each the beginning of the next
        return re.compile("|".join(map(re.escape, sorted(ordered, key=len, reverse=True))))


def _branches(ordered: Sequence[str], low: int, high: int, depth: int) -> str:
    """The pattern of what follows the first ``depth`` characters, which ``ordered[low:high]`` share. It is a tree, so
    that the time of a search does not grow with the number of strings."""
    ends_here = len(ordered[low]) == depth if low < high else False
    low += ends_here
    parts: list[str] = []
    while low < high:
        first = ordered[low]
        stop = next((i for i in range(low + 1, high) if ordered[i][depth] != first[depth]), high)
        last, shared = ordered[stop - 1], depth + 1
        while shared < min(len(first), len(last)) and first[shared] == last[shared]:
            shared += 1
        parts.append(re.escape(first[depth:shared]) + _branches(ordered, low, stop, shared))
        low = stop
    if len(parts) == 1 and not ends_here:
        return parts[0]
    return f"(?:{'|'.join(parts)}){'?' if ends_here else ''}" if parts else ""


def join_spans(spans: Sequence[Span]) -> list[Span]:
    """Drop empty spans and join those that touch; ``spans`` ascend."""
    joined: list[Span] = []
    for start, end in spans:
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def check_unicode(text: str) -> None:
    """Raise ValueError for text that cannot be written as UTF-8 (JSON may contain halves of surrogate pairs)."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half of a surrogate pair in the text ({text[error.start]!a} at character {error.start}), expected "
                "whole characters; remove it, or write the pair as one character"
            ) from None
