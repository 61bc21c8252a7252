"""What to say of a value that is not of its key's type: what is expected, what was given, and what to write instead.

A file of its own because it reads like a table of words, which grows with every type of key.
"""

import re
import typing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from tt_train.settings.keys.schema import default_of, plain, section_type, takes_options, type_of
from tt_train.settings.keys.values import meant

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_CONTAINERS = {list: "a list such as [a, b]", tuple: "a list such as [0.9, 0.95]", dict: "names such as {a: b}"}
# where other tools take a part of something
_INSTEAD_OF_A_SHARE = {
    "epochs": "a part of an epoch is given by max_steps",
    "eval_every": "it counts steps, not a share of the run",
    "save_every": "it counts steps, not a share of the run",
    "schedule.warmup_steps": "a share of the run is schedule.warmup_ratio",
    "schedule.decay_steps": "a share of the run is schedule.decay_ratio",
}


def type_problem(schema: type, key: str, value: Any) -> str:
    """One line: expected, got, and the nearest value that would be accepted."""
    kind = type_of(schema, key)
    inner, optional = plain(kind)
    got = f"the text {shown(value)}" if isinstance(value, str) else shown(value)
    if takes_options(kind):
        cure = f"; write [{value}]" if isinstance(value, str) else ""
        return f"expected a list such as [a, b], or names with options such as {{a: {{project: p}}}}, got {got}{cure}"
    if typing.get_origin(kind) is Annotated:
        return f"expected text or a list of text, got {got}; a name with ': ' in it needs quotes"
    if section := section_type(inner):
        keys = typing.get_type_hints(section)
        expected, cure = f"keys ({', '.join(keys)})", f"did you mean {key}.{next(iter(keys))}?"
    else:
        expected = _expected(inner)
        cure = _cure(schema, key, inner, optional, value)
    return f"expected {expected}{' or null' if optional else ''}, got {got}{f'; {cure}' if cure else ''}"


def _expected(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is list and typing.get_args(kind)[0] in (int, float):
        return f"a list of {'whole ' * (typing.get_args(kind)[0] is int)}numbers such as [1, 2]"
    if origin is dict and typing.get_args(kind)[1] in (int, float):
        return "names with numbers such as {a: 1}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if isinstance(kind, type) and issubclass(kind, Path):
        return "a path"
    return _TYPE_NAMES.get(kind) or _CONTAINERS.get(origin or kind) or str(kind)


def _cure(schema: type, key: str, kind: Any, optional: bool, value: Any) -> str:
    if isinstance(value, float) and 0 < value < 1e9 and key in _INSTEAD_OF_A_SHARE:
        return _INSTEAD_OF_A_SHARE[key]
    if (
        isinstance(value, str)
        and key.endswith("_s")
        and (time := re.fullmatch(r"(\d{1,9}) ?(s|m|min|h)", value.strip()))
    ):
        return f"write {int(time[1]) * {'s': 1, 'h': 3600}.get(time[2], 60)}, in seconds"
    if isinstance(value, str) and kind in (int, float) and (better := meant(value, kind)):
        return f"write {better}"
    if isinstance(value, str) and optional and value.strip().lower() in ("none", "null", "nil", "~", ""):
        return "write null"
    if isinstance(value, str) and typing.get_origin(kind) is list:
        return f"write [{value}]"
    default = default_of(schema, key)
    if default is None:
        return "" if kind not in (int, float) else "write a decimal number, or leave it out"
    return f"the default is {shown(default)}"


def shown(value: Any) -> str:
    """A value as YAML writes it, short enough for one line."""
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a whole number of more than 60 digits"
    text = text or repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
