"""What a typed value means, by the type of its key: text is taken as typed, and numbers are decimal.

YAML would read ``007`` as 7, ``no`` as false, ``1.10`` as 1.1, ``1:30`` as 90 and ``a #1`` as a comment.
"""

import enum
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml

from tt_train.config import TEXT_OR_NUMBER
from tt_train.settings.keys.schema import plain, section_type, takes_options
from tt_train.settings.keys.text import NotPlainError, compose_text, pairs

_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(
    r"[+-]?([0-9]+(_[0-9]+)*\.?([0-9]+(_[0-9]+)*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
    r"|[+-]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)"
)
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULLS = ("null", "Null", "NULL", "~", "")


def of_word(text: str, kind: Any) -> Any:
    """The value of ``text``, typed for a key of type ``kind``; ValueError for a name that is given twice."""
    inner = plain(kind)[0]
    if text == "null":
        return None
    items, values = _kinds_inside(inner)
    stripped = text.strip()
    if takes_options(inner) and stripped.startswith("{"):
        inner, items, values = Any, None, None  # read as YAML: options have values of any kind
    if items and stripped.startswith("[") and stripped.endswith("]"):
        return [of_word(item, items) for item in _split(stripped[1:-1])]
    if values and stripped.startswith("{") and stripped.endswith("}"):
        named = [_pair(item, values) for item in _split(stripped[1:-1])]
        if twice := [name for index, (name, _) in enumerate(named) if name in dict(named[:index])]:
            raise ValueError(f"{twice[0]!r} is given twice; keep one")
        return dict(named)
    if inner in (int, float, bool):
        return _scalar(_unquoted(stripped), inner)
    if _is_text(inner) or items or values:
        return _scalar(_unquoted(text), inner)
    try:
        node = compose_text(text)
    except NotPlainError:
        return text
    return "" if node is None else of_node(node, Any)


def of_node(node: yaml.Node, kind: Any) -> Any:
    """The value of a node of a YAML file for a key of type ``kind``; NotPlainError for what no config has."""
    inner = plain(kind)[0]
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and node.value in _NULLS:
            return None
        if inner in (int, float, bool) or _is_text(inner):
            return _scalar(node.value, inner)
        return node.value if node.style is not None else _untyped(node.value)
    items, values = _kinds_inside(inner)
    if isinstance(node, yaml.SequenceNode):
        return [of_node(item, items or Any) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    found: dict[str, Any] = {}
    for name, key, value in pairs(node):
        if name in found:
            raise NotPlainError(f"{name!r} is given twice; keep one", key.start_mark)
        found[name] = of_node(value, values or Any)
    return found


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that ``kind`` asks for; what is not simple is left to others."""
    inner, optional = plain(kind)
    if value is None:
        return optional
    if (section := section_type(inner)) is not None:
        return isinstance(value, dict | section)
    if takes_options(inner) and not isinstance(value, list):
        return isinstance(value, dict) and all(isinstance(options, dict | None) for options in value.values())
    if typing.get_origin(inner) is Annotated:
        return not isinstance(value, list) or all(isinstance(item, str) for item in value)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin in (list, set, frozenset) or (origin is tuple and arguments[-1:] == (...,)):
        return isinstance(value, list | tuple | set) and all(fits(item, arguments[0]) for item in value)
    if origin is tuple:
        of_length = isinstance(value, list | tuple) and len(value) == len(arguments)
        return of_length and all(fits(item, own) for item, own in zip(value, arguments, strict=True))
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    simple = {bool: bool, int: int, float: int | float, str: str}.get(inner)
    return simple is None or (isinstance(value, simple) and (inner is bool or not isinstance(value, bool)))


def meant(text: str, kind: Any) -> str | None:
    """What to write instead of ``text``, which is no number here but for people; None if nobody knows."""
    text = text.strip()
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,15}|0[oO][0-7]{1,20}|0[bB][01]{1,60}", text):
        return str(int(text, 0))
    if re.fullmatch(r"[+-]?\d{1,3}([, _']\d{3})+(\.\d+)?", text, re.ASCII):
        return re.sub(r"[, _']", "", text)
    if kind is float and re.fullmatch(r"[+-]?\d+,\d+", text, re.ASCII):
        return text.replace(",", ".")
    if kind is float and re.fullmatch(r"\d{1,9}(\.\d{1,9})? ?%", text, re.ASCII):
        return f"{float(text.rstrip('% ')) / 100:g}"
    if scaled := re.fullmatch(r"(\d{1,9}) ?([kKmM])", text, re.ASCII):
        return str(int(scaled[1]) * {"k": 1000, "m": 1_000_000}[scaled[2].lower()])
    return None


def _is_text(kind: Any) -> bool:
    is_like_text = isinstance(kind, type) and issubclass(kind, str | Path | enum.Enum)
    return is_like_text or typing.get_origin(kind) is Annotated


def _kinds_inside(kind: Any) -> tuple[Any, Any]:
    """(the type of a list's items, the type of a mapping's values); None for what ``kind`` is not."""
    if takes_options(kind):
        return str, Any
    if typing.get_origin(kind) is Annotated:
        return str, kind if TEXT_OR_NUMBER in typing.get_args(kind) else float
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple, set, frozenset):
        return arguments[0], None
    if origin is dict:
        return None, arguments[1]
    return None, None


def _scalar(text: str, kind: Any) -> Any:
    """Text as it is; a number or a truth value where ``kind`` wants one and ``text`` is one."""
    if kind is bool:
        return _BOOLEANS.get(text.strip().lower(), text)
    if kind in (int, float) or (typing.get_origin(kind) is Annotated and TEXT_OR_NUMBER in typing.get_args(kind)):
        number = _number(text.strip(), whole=kind is not float)
        return text if number is None else number
    return text


def _number(text: str, *, whole: bool) -> int | float | None:
    """A decimal number; None for any other text, and for one too small or too long to be held."""
    if not _NUMBER.fullmatch(text):
        return None
    if whole and _WHOLE.fullmatch(text):
        return int(text.replace("_", "")) if len(text) < 1000 else None  # Python itself reads no 5,000 digits
    number = float(re.sub(r"\.(inf|nan)", r"\1", text.replace("_", "").lower()))
    if number == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
        return None
    return int(number) if whole and number.is_integer() else number  # 3.0 epochs, 1e3 steps


def _untyped(text: str) -> Any:
    """A plain word of a key that takes anything: true, false, a decimal number, or the text."""
    number = _number(text, whole=_WHOLE.fullmatch(text) is not None)
    return {"true": True, "false": False}.get(text.lower(), text if number is None else number)


def _unquoted(text: str) -> str:
    """``text`` without the quotes around the whole of it, which are how the text ``null`` or ``[a]`` is written."""
    if len(text) < 2 or text[0] not in "'\"" or text[0] != text[-1]:
        return text
    try:
        node = compose_text(text)
    except NotPlainError:
        return text
    return str(node.value) if isinstance(node, yaml.ScalarNode) else text


def _split(text: str) -> Iterator[str]:
    """The parts between commas, but for commas in quotes or brackets."""
    depth, quote, start, blank = 0, "", 0, True  # blank: nothing but spaces since start
    for place, letter in enumerate(text):
        was_blank, blank = blank, blank and letter.isspace()
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and was_blank:
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth <= 0:
            yield text[start:place].strip()
            start, blank = place + 1, True
    if text[start:].strip():
        yield text[start:].strip()


def _pair(text: str, kind: Any) -> tuple[str, Any]:
    """``name: value``: a number comes after the last colon, text after the first."""
    name, colon, value = text.rpartition(": ") if plain(kind)[0] in (int, float) else text.partition(": ")
    return (_unquoted(name.strip()), of_word(value.strip(), kind)) if colon else (text, None)
