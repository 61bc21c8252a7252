"""The keys of a config: which exist, what type each one takes, and which one a mistyped key may mean."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from tt_train.config import OPTIONS
from tt_train.errors import closest, slip
from tt_train.settings.keys.foreign import FOREIGN, foreign_key


def plain(kind: Any) -> tuple[Any, bool]:
    """``X`` of ``X | None`` and whether None is allowed; any other type is itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        if len(inner) == 1:
            return inner[0], len(inner) < len(typing.get_args(kind))
    return kind, kind is Any or typing.get_origin(kind) is Annotated


def section_type(kind: Any) -> type | None:
    """The dataclass of ``X`` or ``X | None``, if it is one."""
    inner = plain(kind)[0]
    return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


def takes_options(kind: Any) -> bool:
    """Whether a key of this type takes names, or names with options."""
    return typing.get_origin(kind) is Annotated and OPTIONS in typing.get_args(kind)


def type_of(schema: type, key: str) -> Any:
    """The annotation at a dotted key; raises KeyError with the part that is unknown and the schema that lacks it."""
    part, dot, rest = key.partition(".")
    hints = typing.get_type_hints(schema, include_extras=True)
    if part not in hints or (dot and not rest):
        raise KeyError(part, schema)
    kind, section = hints[part], section_type(hints[part])
    if rest and section is not None:
        return type_of(section, rest)
    inner = plain(kind)[0]
    if rest and typing.get_origin(inner) is dict:
        return typing.get_args(inner)[1]
    if rest and inner is not Any and typing.get_origin(inner) is not Annotated:
        raise KeyError(rest, None)
    return Any if rest else kind


def parts_of(schema: type, key: str) -> list[str]:
    """The names that lead to a key; the last one may hold dots, if it is a name in a mapping of the user's own."""
    part, _, rest = key.partition(".")
    if not rest:
        return [part]
    kind = typing.get_type_hints(schema, include_extras=True)[part]
    if takes_options(kind) and "." in rest:  # loggers.wandb.project
        return [part, *rest.rsplit(".", 1)]
    section = section_type(kind)
    return [part, *(parts_of(section, rest) if section else [rest])]


def is_section(schema: type, key: str) -> bool:
    """Whether ``key`` holds other keys."""
    try:
        return section_type(type_of(schema, key)) is not None
    except KeyError:
        return False


def all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key, sections before what they hold."""
    for name, kind in typing.get_type_hints(schema).items():
        yield prefix + name
        if section := section_type(kind):
            yield from all_keys(section, f"{prefix}{name}.")


def unknown_key(schema: type, key: str) -> str:
    """``unknown key``, with what another tool's key is called here, or the nearest one: spelt alike, or elsewhere."""
    keys = list(all_keys(schema))
    near = closest(key, keys)
    is_theirs = key.lower().replace("-", "_") in FOREIGN
    if near and slip(key, near) is not None and not is_theirs:  # scedule.decay, although decay is a key of others
        return f"unknown key; did you mean {near!r}?"
    if said := foreign_key(key):
        return f"unknown key; {said}"
    homes: dict[str, str] = {}  # the last part of a key -> the first key that ends with it
    for known in keys:
        homes.setdefault(known.rsplit(".", 1)[-1], known)
    last = key.rsplit(".", 1)[-1]
    home = homes.get(last) or (None if near else homes.get(closest(last, homes) or ""))
    if home is None and closest(last, homes, cutoff=0.8) is None and (theirs := closest(last, FOREIGN, cutoff=0.8)):
        return f"unknown key; {foreign_key(theirs)}"  # learing_rate
    meant = home or near
    return f"unknown key; did you mean {meant!r}?" if meant else "unknown key; tt cat sft shows every key"


def default_of(schema: type, key: str) -> Any:
    """The value of a key that is not given; None if there is none."""
    part, _, rest = key.partition(".")
    field = next((field for field in dataclasses.fields(schema) if field.name == part), None)
    section = section_type(typing.get_type_hints(schema)[part]) if field else None
    if rest:
        return default_of(section, rest) if section else None
    if field is None or field.default_factory is dataclasses.MISSING:
        return None if field is None or field.default is dataclasses.MISSING else field.default
    return field.default_factory()
