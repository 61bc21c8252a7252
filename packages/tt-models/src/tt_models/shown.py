"""Values of files in messages: short, on one line, without control characters."""

from collections.abc import Iterable, Mapping


def shown(value: object, limit: int = 80) -> str:
    """``value`` in quotes, or in the form that JSON has for it; a large one by its size."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}... ({len(value):,} characters)"
    if isinstance(value, Mapping | list | tuple):
        return _collection(value)
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    return plain(repr(value), limit)


def _collection(value: Mapping[object, object] | list[object] | tuple[object, ...]) -> str:
    kind = "an object" if isinstance(value, Mapping) else "a list"
    parts = [*value, *value.values()] if isinstance(value, Mapping) else [*value[:5]]
    if len(value) > 4 or any(isinstance(part, Mapping | list | tuple) for part in parts):
        return f"{kind} of {len(value):,}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{shown(key, 24)}: {shown(part, 24)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(shown(part, 24) for part in value) + "]"


def plain(value: object, limit: int = 200) -> str:
    """``value`` as text without quotes; characters that are not printable are escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)[: 2 * limit])
    return text if len(text) <= limit else text[:limit] + "..."


def listed(names: Iterable[object], count: int = 5) -> str:
    """The first names, in order, and how many more there are."""
    held = sorted(map(plain, names))
    return ", ".join(held[:count]) + (f" and {len(held) - count:,} more" if len(held) > count else "")
