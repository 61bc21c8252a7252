"""Special tokens that somebody typed into data: found, and kept apart from those that a chat template writes.

A nonce breaks them on their way through the template, so that every whole one in its text is the template's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tt_data.template.spans import MarkedText, Span, alternatives, substitute

_MOST_NAMED = 3  # in one row: a text about tokenizers would fill the report


class SpecialTokens:
    """The strings of a tokenizer that are tokens only if a template writes them."""

    def __init__(self, strings: Iterable[str]) -> None:
        known = self.strings = [text for text in strings if text]
        self._beginnings = {token[:n] for token in known for n in range(1, len(token))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._whole = alternatives(known)
        firsts = {json.dumps(token[0])[1:-1] for token in known}
        self._suspect = alternatives(firsts)  # in the JSON of a conversation: it may have to be broken

    def notes(self, text: str) -> tuple[str, ...]:
        """What a report says of the special tokens that ``text`` spells."""
        return _notes({match.group() for match in self._whole.finditer(text)})

    def broken(self, content: Any, written: str, nonce: str) -> tuple[Any, tuple[str, ...]]:
        """``content`` (``written`` as JSON) with every such string in it broken by ``nonce``, and what to say of them;
        the same object if there is none."""
        if not self._suspect.search(written):
            return content, ()
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
    cure = "it stays text; data.special_tokens=tokens (special_tokens='tokens') makes it the token"
    if len(found) > _MOST_NAMED:
        return (f"more than {_MOST_NAMED} special tokens are spelt out in the data: {cure}",)
    return tuple(f"the special token {token!r} is spelt out in the data: {cure}" for token in sorted(found))


def typed_spans(tokenizer: Any, ids: Sequence[int]) -> list[Span]:
    """The characters of ``tokenizer.decode(ids, skip_special=False)`` that spell a special token without being one."""
    special = {tokenizer.token_id(token): token for token in tokenizer.special_tokens}
    pattern = alternatives(special.values())
    places = [place for place, index in enumerate(ids) if index in special]
    if len(pattern.findall(tokenizer.decode(ids, skip_special=False))) <= len(places):
        return []
    spans: list[Span] = []
    position = 0
    for before, place in pairwise([-1, *places, len(ids)]):
        head = special[ids[before]] if before >= 0 else ""  # decoders treat the beginning of a text differently
        run = tokenizer.decode(ids[max(before, 0) : place], skip_special=False)[len(head) :]
        position += len(head)
        spans += [(position + match.start(), position + match.end()) for match in pattern.finditer(run)]
        position += len(run)
    return spans
