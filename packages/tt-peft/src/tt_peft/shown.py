"""Values of files in messages: short, on one line, without control characters or passwords."""

import re
from collections.abc import Collection, Mapping

_PASSWORD = re.compile(r"(?<=://)[^/@\s]{1,1000}(?=@)")


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
    """``value`` as text without quotes: what is not printable is escaped, the password of an address is blanked."""
    text = _PASSWORD.sub("***", str(value)[: 4 * limit])
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[:limit] + "..."


def listed(names: Collection[str], count: int = 3) -> str:
    """The first of ``names``, and how many more there are."""
    first = ", ".join(plain(name) for name in sorted(names)[:count])
    return first + (f" and {len(names) - count:,} more" if len(names) > count else "")
