"""Names and expressions for dotted module names, in time that grows with their number and not with its square."""

import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

V = TypeVar("V")

_PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")


def endings(name: str) -> list[str]:
    """What means the dotted ``name``: all of it, or its last whole parts."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def named(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of ``names`` that any of ``targets`` means."""
    wanted = set(targets)
    return [name for name in names if not wanted.isdisjoint(endings(name))]


def known(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of ``targets`` that mean any of ``names``."""
    meaning = {ending for name in names for ending in endings(name)}
    return [target for target in targets if target in meaning]


def check_expression(target: str) -> None:
    try:
        re.compile(target)
    except re.error as error:
        raise ValueError(f"{target!r} is not a valid regular expression: {error}") from None


class Patterns(Generic[V]):
    """``rank_pattern`` or ``alpha_pattern``: expressions for the last whole parts of a name; the first match decides.

    PEFT reads every key as an expression. One that is a name, its dots escaped or not, is looked up.
    """

    def __init__(self, patterns: Mapping[str, V]) -> None:
        self._plain: dict[str, tuple[int, str]] = {}
        self._expressions: list[tuple[int, str, re.Pattern[str]]] = []
        self._values = patterns
        for place, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern.replace("\\.", "."), (place, pattern))
            else:
                check_expression(pattern)
                self._expressions.append((place, pattern, re.compile(rf"(?:.*\.)?(?:{pattern})$")))

    def match(self, name: str) -> str | None:
        """The first pattern that means ``name``."""
        found = [self._plain[ending] for ending in endings(name) if ending in self._plain]
        first = min(found, default=None)
        for place, pattern, expression in self._expressions:
            if first is not None and first[0] < place:
                break
            if expression.match(name):
                return pattern
        return None if first is None else first[1]

    def get(self, name: str, default: V) -> V:
        """The value of the first pattern that means ``name``."""
        pattern = self.match(name)
        return default if pattern is None else self._values[pattern]

    def meaning(self, names: Iterable[str]) -> dict[str, V]:
        """The patterns that mean any of ``names``, with their values."""
        names = list(names)
        plain = {ending for name in names for ending in endings(name) if ending in self._plain}
        wanted = {self._plain[ending][1] for ending in plain}
        wanted |= {pattern for _, pattern, expression in self._expressions if any(map(expression.match, names))}
        return {pattern: value for pattern, value in self._values.items() if pattern in wanted}
