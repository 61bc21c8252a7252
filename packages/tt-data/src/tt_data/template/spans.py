"""Text and ids with spans: which parts are control tokens, and which parts are trained."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Span = tuple[int, int]
_MOST_NAMED = 3  # special tokens in a note of one row: a text about tokenizers would fill the report
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


def cut(row: Encoded, max_seq_len: int | None) -> Encoded:
    """The first ``max_seq_len`` tokens; no end is added."""
    if max_seq_len is None or len(row.ids) <= max_seq_len:
        return row
    spans = [(a, min(b, max_seq_len)) for a, b in row.trained if a < max_seq_len]
    return Encoded(row.ids[:max_seq_len], spans, row.notes)


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


class SpecialTokens:
    """The strings of a tokenizer that are tokens only if a template writes them, and never if somebody typed them.

    A nonce breaks the typed ones on their way through the template, so that every whole one in its text is its own.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        known = self.strings = [text for text in strings if text]
        self._beginnings = {token[:n] for token in known for n in range(1, len(token))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._whole = alternatives(known)
        firsts = {json.dumps(token[0])[1:-1] for token in known}
        self.suspect = alternatives(firsts)  # in the JSON of a conversation: it may have to be broken

    def notes(self, text: str) -> tuple[str, ...]:
        """What a report says of the special tokens that ``text`` spells."""
        return _notes({match.group() for match in self._whole.finditer(text)})

    def broken(self, content: Any, nonce: str) -> tuple[Any, tuple[str, ...]]:
        """``content`` with every such string in it broken by ``nonce``, and what to say of them; the same object if
        there is none."""
        found: set[str] = set()
        return self._broken(content, nonce, found), _notes(found)

    def _broken(self, value: Any, nonce: str, found: set[str]) -> Any:
        """A string whose end may begin a special token is broken, too: the template may write the rest of it."""
        if isinstance(value, str):
            return self._broken_text(value, nonce, found)
        if isinstance(value, Mapping):
            items = {self._broken(k, nonce, found): self._broken(v, nonce, found) for k, v in value.items()}
            same = all(a is b and items[a] is value[b] for a, b in zip(items, value, strict=True))
            return value if same else items
        if isinstance(value, (list, tuple)):
            values = [self._broken(item, nonce, found) for item in value]
            return values if any(a is not b for a, b in zip(values, value, strict=True)) else value
        return value

    def _broken_text(self, text: str, nonce: str, found: set[str]) -> str:
        places: list[int] = []
        end = 0
        for match in self._whole.finditer(text):
            found.add(match.group())
            places.append(match.start() + 1)
            end = match.end()
        for start in range(max(end, len(text) - self._longest), len(text)):
            if text[start:] in self._beginnings:
                places.append(start + 1)
                break
        if not places:
            return text
        return nonce.join(text[a:b] for a, b in pairwise([0, *places, len(text)]))

    def mended(self, text: str, trained: list[Span], nonce: str) -> MarkedText:
        """The text of broken content without the nonces, and with the places of the tokens that were whole in it."""
        controls = [m.span() for m in self._whole.finditer(text)]
        edits = [(m.start(), m.end(), "") for m in re.finditer(nonce, text)]
        clean, moved = substitute(text, edits, [*trained, *controls])
        trained, controls = moved[: len(trained)], moved[len(trained) :]
        seen = [m.span() for m in self._whole.finditer(clean)]
        return MarkedText(clean, trained, None if seen == controls else controls)


def _notes(found: set[str]) -> tuple[str, ...]:
    if not found:
        return ()
    cure = "it stays text; data.special_tokens=tokens (special_tokens='tokens') makes it the token"
    if len(found) > _MOST_NAMED:
        return (f"more than {_MOST_NAMED} special tokens are spelt out in the data: {cure}",)
    return tuple(f"the special token {token!r} is spelt out in the data: {cure}" for token in sorted(found))


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
