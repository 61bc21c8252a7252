"""What a typed value means, by the type of its key: text is taken as typed, and numbers are decimal.

YAML would read ``007`` as 7, ``no`` as false, ``1.10`` as 1.1, ``1:30`` as 90 and ``a #1`` as a comment.
"""

import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import yaml

from tt_train.keys import plain

TEXT, TEXT_OR_NUMBER = "text", "text or number"  # of Annotated[Any, ...]: also as a list, or as the keys of numbers

_WHOLE = re.compile(r"[+-]?\d[\d_]*")
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULLS = ("null", "Null", "NULL", "~", "")
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in
            ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")}  # fmt: skip


class PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; write the value again", event.start_mark
            )
        return super().compose_node(parent, index)


def of_word(text: str, kind: Any) -> Any:
    """The value of ``text``, typed on the command line for a key of type ``kind``."""
    inner = plain(kind)[0]
    if text == "null":
        return None
    items, pairs = _kinds_inside(inner)
    stripped = text.strip()
    if items and stripped.startswith("[") and stripped.endswith("]"):
        return [of_word(item, items) for item in _split(stripped[1:-1])]
    if pairs and stripped.startswith("{") and stripped.endswith("}"):
        return dict(_pair(item, pairs) for item in _split(stripped[1:-1]))
    if inner is str or _is_text(inner) or items or pairs:
        return _scalar(_unquoted(text), inner)
    if inner in (int, float, bool):
        return _scalar(_unquoted(stripped), inner)
    try:
        return yaml.load(text, Loader=PlainLoader) if text else ""  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        return text


def of_node(node: yaml.Node, kind: Any) -> Any:
    """The value of a node of a YAML file for a key of type ``kind``; raises yaml.YAMLError for a tag."""
    inner = plain(kind)[0]
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        if node.style is None and node.value in _NULLS:
            return None
        if inner in (str, int, float, bool) or _is_text(inner):
            return _scalar(node.value, inner)
    items, pairs = _kinds_inside(inner)
    if items and isinstance(node, yaml.SequenceNode):
        return [of_node(item, items) for item in node.value]
    if pairs and isinstance(node, yaml.MappingNode):
        return {of_node(key, str): of_node(value, pairs) for key, value in node.value}
    return yaml.SafeLoader("").construct_object(node, deep=True)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the simple type that ``kind`` asks for; what is not simple is left to others."""
    inner, optional = plain(kind)
    if value is None:
        return optional
    if _is_text(inner):
        return not isinstance(value, list) or all(isinstance(item, str) for item in value)
    simple = {bool: bool, int: int, float: int | float, str: str}.get(inner)
    return simple is None or (isinstance(value, simple) and (inner is bool or not isinstance(value, bool)))


def _is_text(kind: Any) -> bool:
    return typing.get_origin(kind) is Annotated


def _kinds_inside(kind: Any) -> tuple[Any, Any]:
    """(the type of a list's items, the type of a mapping's values) where those of ``kind`` begin as text, else None."""
    if _is_text(kind):
        return str, float
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list and arguments[0] in (str, int, float):
        return arguments[0], None
    if typing.get_origin(kind) is dict and arguments[0] is str:
        return None, arguments[1]
    return None, None


def _scalar(text: str, kind: Any) -> Any:
    """Text as it is; a number or a truth value where ``kind`` wants one and ``text`` is one."""
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    number_wanted = kind in (int, float) or (_is_text(kind) and TEXT_OR_NUMBER in typing.get_args(kind))
    if number_wanted and _WHOLE.fullmatch(text):
        return int(text.replace("_", ""))
    if number_wanted and _NUMBER.fullmatch(text):
        number = float(re.sub(r"\.(inf|nan)", r"\1", text.replace("_", "").lower()))
        return int(number) if kind is int and number.is_integer() else number  # 3.0 epochs, 1e3 steps
    return text


def _unquoted(text: str) -> str:
    """``text`` without the quotes around the whole of it, which are how the text ``null`` or ``[a]`` is written."""
    if len(text) < 2 or text[0] not in "'\"" or text[0] != text[-1]:
        return text
    try:
        node = yaml.compose(text, Loader=PlainLoader)
    except yaml.YAMLError:
        return text
    return str(node.value) if isinstance(node, yaml.ScalarNode) else text


def _split(text: str) -> Iterator[str]:
    """The parts between commas, but for commas in quotes or brackets."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:place].strip():
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth <= 0:
            yield text[start:place].strip()
            start = place + 1
    if text[start:].strip():
        yield text[start:].strip()


def _pair(text: str, kind: Any) -> tuple[str, Any]:
    """``name: value``: a number comes after the last colon, text after the first."""
    name, colon, value = text.rpartition(": ") if plain(kind)[0] in (int, float) else text.partition(": ")
    return (_unquoted(name.strip()), of_word(value.strip(), kind)) if colon else (text, None)
