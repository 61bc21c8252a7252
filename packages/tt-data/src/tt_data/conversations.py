"""Lists of turns, as OpenAI and sharegpt write them, to ``Message``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tt_data.examples import BadRowError
from tt_data.messages import Message, normal_role

_KNOWN = ("role", "from", "content", "value", "text", "weight", "loss", "train")


def read_messages(turns: Any) -> list[Message]:
    """Messages from ``[{"role", "content"}]`` or ``[{"from", "value"}]``. Raises BadRowError naming the turn.

    ``weight: 0`` (OpenAI) and ``loss``/``train: false`` mask a turn; content lists are joined where they are text.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _from_json(turns, "messages")
    if turns is None:
        raise BadRowError("null", "the list of messages is null")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRowError("wrong type", f"expected a list of messages, found {type(turns).__name__}")
    if not turns:
        raise BadRowError("empty", "the list of messages is empty")
    return [_message(turn, i) for i, turn in enumerate(turns)]


def read_tools(tools: Any) -> Sequence[Mapping[str, Any]] | None:
    """Tool schemas, from a list or from JSON text."""
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError("wrong type", "tools must be a list of JSON schemas")
    return [dict(tool) for tool in tools]


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError("wrong type", f"{name} is text but not JSON ({error})") from None


def _message(turn: Any, i: int) -> Message:
    if isinstance(turn, Message):
        return turn
    if not isinstance(turn, Mapping):
        raise BadRowError(
            "wrong type", f"message {i} is {type(turn).__name__}, expected an object with role and content"
        )
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise BadRowError("missing column", f"message {i} has no role, only {', '.join(map(repr, turn))}")
    try:
        name = normal_role(role)
    except ValueError as error:
        raise BadRowError("unknown role", f"message {i}: {error}") from None
    extra = {key: value for key, value in turn.items() if key not in _KNOWN and value is not None}
    content = _content(turn, i, may_be_null=bool(extra.get("tool_calls")))
    if content is None:  # a call without words: the template must not find any, not even empty ones
        content, extra["content"] = "", None
    if name == "assistant" and not content.strip() and not extra.get("tool_calls"):
        raise BadRowError("empty", f"the assistant message {i} is empty")
    return Message(name, content, _is_masked(turn, i), _with_parsed_calls(extra, i))


def _content(turn: Mapping[str, Any], i: int, *, may_be_null: bool) -> str | None:
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if content is None:
        if may_be_null:
            return None
        raise BadRowError("null", f"the content of message {i} is null")
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(_part(part, i) for part in content)
    raise BadRowError("wrong type", f"the content of message {i} is {type(content).__name__}, expected text")


def _part(part: Any, i: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRowError("not text", f"message {i} has a part of type {kind!r}; only text is supported")


def _is_masked(turn: Mapping[str, Any], i: int) -> bool:
    for key in ("weight", "loss", "train"):
        value = turn.get(key)
        if value is not None:
            if value not in (0, 1):
                raise BadRowError("wrong weight", f"message {i} has {key} {value!r}, expected 0 or 1")
            return not value
    return False


def _with_parsed_calls(extra: dict[str, Any], i: int) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates want the object."""
    calls = extra.get("tool_calls")
    if not calls:
        return extra
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError("wrong type", f"the tool_calls of message {i} are no list of objects")
    parsed = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("wrong type", f"a call in message {i} has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function = {
                **function,
                "arguments": _from_json(arguments or "{}", f"the arguments of a call in message {i}"),
            }
        parsed.append({**call, "function": function} if "function" in call else function)
    return {**extra, "tool_calls": parsed}
