"""Lists of turns, as OpenAI and sharegpt write them, to ``Message``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tt_data.examples import BadRowError, Columns, Row, cell
from tt_data.messages import Message, normal_role
from tt_data.rows.json_files import load_json
from tt_data.wording import names_of

_MOST_TURNS = 1000  # finding the trained tokens takes time that grows with their square
_KNOWN = ("role", "from", "content", "value", "text")
# Keys that switch the loss of a turn on or off, as tools spell them: True trains, or True masks.
_TRAINS = (
    "weight", "loss", "loss_weight", "loss_mask", "compute_loss", "train", "training", "trainable", "is_trainable",
    "train_on", "train_on_turn",
)  # fmt: skip
_MASKS = ("masked", "mask", "is_masked", "ignore", "ignore_loss", "no_loss")
_PARTS_OF_A_TURN = ("train_detail", "training_detail", "train_details", "training_details")
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # sharegpt: a turn of the assistant that is a call


def read_messages(turns: Any) -> list[Message]:
    """Messages from ``[{"role", "content"}]`` or ``[{"from", "value"}]``. Raises BadRowError naming the turn.

    ``weight: 0`` (OpenAI), ``train: false``, ``masked: true`` and their like mask a turn; content lists are joined if
    they are text; calls in the older ``function_call`` and in sharegpt's turns of that name become ``tool_calls``.
    """
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        turns = read_json(turns, "messages")
    turns = _by_turn(turns)
    if turns is None:
        raise BadRowError("null", "the list of messages is null")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRowError("wrong type", f"expected a list of messages, found {type(turns).__name__}")
    if not turns:
        raise BadRowError("empty", "the list of messages is empty")
    if len(turns) > _MOST_TURNS:
        raise BadRowError(
            "too many messages", f"{len(turns):,} messages, expected at most {_MOST_TURNS:,}; split the conversation"
        )
    if all(isinstance(turn, str) for turn in turns):
        raise BadRowError(
            "wrong type",
            "the turns are texts without roles (as in LIMA's rows); write each as an object with role and content, the "
            "user's and the assistant's in turn",
        )
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        message = _message(turn, i)
        if message.role == "system" and not message.content.strip() and i == 0 and len(turns) > 1:
            continue  # it is empty: the template writes what it writes without a system message
        if _is_call(turn) and messages and messages[-1].role == "assistant":
            message = _joined(messages.pop(), message, i)
        messages.append(message)
    return messages


def sharegpt_to_llama2_messages(sample: Mapping[str, Any], train_on_input: bool = False) -> list[Message]:
    """The turns of a sharegpt row, all but the assistant's masked, or none (torchtune's name). Raises ValueError."""
    if "conversations" not in sample:
        raise BadRowError("missing column", f"no column 'conversations', the row has {names_of(sample)}")
    messages = read_messages(sample["conversations"])
    if train_on_input:
        return messages
    return [message if message.role == "assistant" else replace(message, masked=True) for message in messages]


def messages_or_text(value: Any) -> Any:
    """The turns that a column holds, as a list (also from JSON text, or a single turn); any other value as it is."""
    if not isinstance(value, str):
        return as_turns(value) or value
    if value[:1] not in ("[", "{") and value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return as_turns(load_json(value)) or value
    except ValueError:
        return value


def turns_or_text(row: Row, columns: Columns, *names: str) -> Any:
    """The turns (as a list) or the value of the first of these columns. Raises BadRowError if the row has none."""
    return messages_or_text(cell(row, columns, *names))


def _by_turn(value: Any) -> Any:
    """``{"role": [...], "content": [...]}``, as columnar files may hold turns, as a list of turns."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        same = len({len(column) for column in value.values()}) == 1
        if same and ("role" in value or "from" in value):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value


def as_turns(value: Any) -> list[Any] | None:
    """``value`` as a list of turns, None if it is something else."""
    turns = _by_turn(value)
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return None
    if all(isinstance(t, Message) or (isinstance(t, Mapping) and ("role" in t or "from" in t)) for t in turns):
        return list(turns)
    return None


def read_tools(tools: Any) -> Sequence[Mapping[str, Any]] | None:
    """Tool schemas, from a list or from JSON text."""
    if isinstance(tools, str):
        tools = read_json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError("wrong type", "tools must be a list of JSON schemas")
    return [dict(tool) for tool in tools]


def read_json(text: str, name: str) -> Any:
    """The value of JSON text. Raises BadRowError that names the column."""
    try:
        return load_json(text)
    except ValueError as error:
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
        raise BadRowError("missing column", f"message {i} has no role, only {names_of(turn)}")
    if _is_call(turn):
        turn, role = _call_as_turn(turn, i), "assistant"
    try:
        name = normal_role(role)
    except ValueError as error:
        raise BadRowError("unknown role", f"message {i}: {error}") from None
    if name in ("system", "tool") and all(turn.get(key) is None for key in ("content", "value", "text")):
        turn = {**turn, "content": ""}  # a tool may return nothing
    masked, asked = _said(turn, i)
    extra = {key: value for key, value in turn.items() if key not in _NOT_EXTRA and value is not None}
    older = extra.pop("function_call", None)
    if older is not None and not extra.get("tool_calls"):
        extra["tool_calls"] = [{"type": "function", "function": older}]
    if not extra.get("tool_calls"):
        extra.pop("tool_calls", None)  # an empty list is not a call
    if name == "tool":
        turn = _with_result_as_text(turn)
    content, parts = _content(turn, i, may_be_null="tool_calls" in extra)
    if content is None:  # a call without words: the template must not find any, not even empty ones
        content, extra["content"] = "", None
    if parts is not None:  # for templates that read parts; others are given the text
        extra["content"] = parts
    if name == "assistant" and not content.strip() and "tool_calls" not in extra:
        raise BadRowError("empty", f"the assistant message {i} is empty")
    return Message(name, content, masked, _checked_calls(extra, i), asked)


def _is_call(turn: Any) -> bool:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return isinstance(role, str) and role.strip().lower() in _CALL_ROLES


def _call_as_turn(turn: Mapping[str, Any], i: int) -> dict[str, Any]:
    """sharegpt's call, whose value is JSON text, as OpenAI writes one."""
    calls = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if isinstance(calls, str):
        calls = read_json(calls, f"the call in message {i}")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, Sequence) or not calls or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError("wrong type", f"message {i} is a call, expected JSON of an object with name and arguments")
    calls = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return {key: value for key, value in turn.items() if key not in _KNOWN} | {"content": None, "tool_calls": calls}


def _joined(words: Message, call: Message, i: int) -> Message:
    """An assistant's words (or calls) and the call that follows them: one turn."""
    if words.masked != call.masked:
        raise BadRowError("wrong weight", f"message {i} is a call of message {i - 1}: only one of them is masked")
    calls = [*words.extra.get("tool_calls", ()), *call.extra["tool_calls"]]
    extra = {**call.extra, **words.extra, "tool_calls": calls}
    if words.content:
        extra.pop("content", None)
    return Message("assistant", words.content, words.masked, extra, words.asked or call.asked)


def _with_result_as_text(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's result that is an object, or a list of other things than parts, as JSON text."""
    key = next((key for key in ("content", "value", "text") if key in turn), "content")
    result = turn.get(key)
    is_parts = isinstance(result, list) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and ("type" in part or "text" in part)) for part in result
    )
    if isinstance(result, (Mapping, list, int, float)) and (not is_parts or not result):
        return {**turn, key: json.dumps(result, ensure_ascii=False)}
    return turn


def _content(
    turn: Mapping[str, Any], i: int, *, may_be_null: bool
) -> tuple[str | None, list[dict[str, Any]] | None]:  # fmt: skip
    """A turn's words; and its parts, if that is what it has."""
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if content is None:
        if may_be_null:
            return None, None
        raise BadRowError("null", f"the content of message {i} is null")
    if isinstance(content, str):
        return content, None
    if isinstance(content, Sequence):
        parts = [_part(part, i) for part in content]
        return "".join(part["text"] for part in parts), parts
    raise BadRowError("wrong type", f"the content of message {i} is {type(content).__name__}, expected text")


def _part(part: Any, i: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return {"type": "text", **{key: value for key, value in part.items() if value is not None}}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRowError("not text", f"message {i} has a part of type {kind!r}; only text is supported")


def _said(turn: Mapping[str, Any], i: int) -> tuple[bool, bool]:
    """Whether one of the turn's keys switches its loss off, and whether one says that the turn is trained."""
    for key in _PARTS_OF_A_TURN:
        if turn.get(key):
            raise BadRowError(
                "wrong weight", f"message {i} has {key}: only whole turns can be masked, not parts of them"
            )
    masked = asked = False
    for key in (*_TRAINS, *_MASKS):
        value = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise BadRowError("wrong weight", f"message {i} has {key} {value!r}, expected 0 or 1 (true or false)")
        is_off = bool(value) == (key in _MASKS)
        masked, asked = masked or is_off, asked or not is_off
    return masked, asked and not masked


_NOT_EXTRA = frozenset((*_KNOWN, *_TRAINS, *_MASKS, *_PARTS_OF_A_TURN))


def _checked_calls(extra: dict[str, Any], i: int) -> dict[str, Any]:
    """``extra``, if its calls have names. Their arguments stay as they are, JSON text (OpenAI's form) or an object: the
    template takes one of them, or both."""
    calls = extra.get("tool_calls")
    if not calls:
        return extra
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError("wrong type", f"the tool_calls of message {i} are not a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRowError("wrong type", f"a call in message {i} has no function with a name")
        if isinstance(function.get("arguments"), str):
            read_json(function["arguments"] or "{}", f"the arguments of a call in message {i}")
    return {**extra, "tool_calls": list(calls)}
