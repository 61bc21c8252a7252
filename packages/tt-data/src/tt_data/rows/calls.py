"""Calls of tools and their results in a turn, however OpenAI and sharegpt write them, as OpenAI's ``tool_calls``.

A file apart from ``conversations``: turns of plain words never need it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tt_data.examples import BadRowError
from tt_data.messages import Message
from tt_data.rows.json_values import read_json

KNOWN = ("role", "from", "content", "value", "text")  # keys of a turn that is only words
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # sharegpt: a turn of the assistant that is a call


def read_tools(tools: Any, *, are_functions: bool) -> Sequence[Mapping[str, Any]] | None:
    """Tool schemas, from a list or from JSON text. ``are_functions``: in OpenAI's older form, which is made tools."""
    if isinstance(tools, str):
        tools = read_json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError("wrong type", "tools must be a list of JSON schemas")
    if are_functions:
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return [dict(tool) for tool in tools]


def is_call(turn: Any) -> bool:
    """Whether this is a sharegpt turn whose value is a call."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return isinstance(role, str) and role.strip().lower() in _CALL_ROLES


def call_as_turn(turn: Mapping[str, Any], i: int) -> dict[str, Any]:
    """sharegpt's call, whose value is JSON text, as OpenAI writes one."""
    calls = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if isinstance(calls, str):
        calls = read_json(calls, f"the call in message {i}")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or not calls or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError("wrong type", f"message {i} is a call, expected JSON of an object with name and arguments")
    calls = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return {key: value for key, value in turn.items() if key not in KNOWN} | {"content": None, "tool_calls": calls}


def joined(words: Message, call: Message, i: int) -> Message:
    """An assistant's words (or calls) and the call that follows them: one turn."""
    if words.masked != call.masked:
        raise BadRowError("wrong weight", f"message {i} is a call of message {i - 1}: only one of them is masked")
    calls = [*words.extra.get("tool_calls", ()), *call.extra["tool_calls"]]
    extra = {**call.extra, **words.extra, "tool_calls": calls}
    if words.content:
        extra.pop("content", None)
    return Message("assistant", words.content, words.masked, extra, words.asked or call.asked)


def result_as_text(result: Any) -> Any:
    """A tool's result that is an object, or a list of other things than parts, as JSON text."""
    is_parts = isinstance(result, list) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and ("type" in part or "text" in part)) for part in result
    )
    if isinstance(result, (Mapping, list, int, float)) and (not is_parts or not result):
        return json.dumps(result, ensure_ascii=False)
    return result


def check_calls(calls: Any, i: int) -> list[Any]:
    """The calls of message ``i``, if they have names. Their arguments stay as they are, JSON text (OpenAI's form) or an
    object: the template takes one of them, or both. Raises BadRowError."""
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError("wrong type", f"the tool_calls of message {i} are not a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("wrong type", f"a call in message {i} has no function with a name")
        if isinstance(function.get("arguments"), str):
            read_json(function["arguments"] or "{}", f"the arguments of a call in message {i}")
    return list(calls)
