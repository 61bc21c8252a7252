"""A config on its way from torchtune's keys to ours: what is left of theirs, and what is to be said."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Carry:
    """torchtune's keys, dotted, that are not dealt with yet; ours so far; and what is to be said."""

    theirs: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    devices: int = 1
    is_old: bool = False  # of 0.1 or 0.2, whose data sets write and cut the rows

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is dealt with by this."""
        return self.theirs.pop(key, default)

    def component(self, key: str) -> str:
        """The dotted path of a component; "" if there is none."""
        return str(self.take(f"{key}._component_") or "")

    def section(self, key: str) -> dict[str, Any]:
        """All keys below ``key``, which are dealt with by this."""
        found = {name: self.theirs[name] for name in list(self.theirs) if name.startswith(f"{key}.")}
        return {name.removeprefix(f"{key}."): self.theirs.pop(name) for name in found}

    def set(self, key: str, value: Any) -> None:
        """Set one of our keys, dotted."""
        *sections, last = key.split(".")
        node = self.ours
        for name in sections:
            node = node.setdefault(name, {})
        node[last] = value

    def say(self, key: str, why: str) -> None:
        self.problems.append(f"{key}: {why}")
