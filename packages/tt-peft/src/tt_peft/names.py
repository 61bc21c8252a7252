"""Names and expressions for dotted module names, in time that grows with their number and not with its square."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from tt_peft.expressions import matches

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


def owner_of(name: str, owners: Collection[str]) -> str | None:
    """The first of ``owners`` (a set, if there are many) that the module ``name`` is or is inside of."""
    parts = name.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((each for each in outer if each in owners), None)


def layers_of(names: Sequence[str], patterns: Sequence[str] = ()) -> list[int | None]:
    """The first number among the parts of each name, as PEFT counts layers; only behind one of ``patterns``, if any."""
    found = matches(patterns or ("[^.]*",), names, within=r"(?s:(?:.*?\.)?(?:{})\.(?P<tt_layer>\d+)\..*)")
    first = [next((one[place] for one in found if place in one), None) for place in range(len(names))]
    return [None if layer is None else int(layer) for layer in first]


class Patterns(Generic[V]):
    """``rank_pattern`` or ``alpha_pattern``: expressions for the last whole parts of a name; the first match decides.

    PEFT reads every key as an expression. One that is a name, its dots escaped or not, is looked up.
    """

    def __init__(self, patterns: Mapping[str, V]) -> None:
        self._plain: dict[str, tuple[int, str]] = {}
        self._expressions: list[tuple[int, str]] = []
        self._values = patterns
        self._known: dict[str, list[tuple[int, str]]] = {}  # name -> all patterns that mean it
        for place, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern.replace("\\.", "."), (place, pattern))
            else:
                self._expressions.append((place, pattern))

    def _learn(self, names: Iterable[str]) -> None:
        """All that is not known yet, at once."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        expressions = [pattern for _, pattern in self._expressions]
        found = matches(expressions, new, within=r"(?:.*\.)?(?:{})$") if new and expressions else []
        for name in new:
            self._known[name] = [self._plain[ending] for ending in endings(name) if ending in self._plain]
        for each, places in zip(self._expressions, found, strict=False):
            for place in places:
                self._known[new[place]].append(each)

    def get(self, name: str, default: V) -> V:
        """The value of the first pattern that means ``name``."""
        if not self._values:
            return default
        if name not in self._known:
            self._learn([name])
        first = min(self._known[name], default=None)
        return default if first is None else self._values[first[1]]

    def meaning(self, names: Iterable[str]) -> dict[str, V]:
        """The patterns that mean any of ``names``, with their values."""
        names = list(names)
        self._learn(names)
        wanted = {pattern for name in names for _, pattern in self._known[name]}
        return {pattern: value for pattern, value in self._values.items() if pattern in wanted}
