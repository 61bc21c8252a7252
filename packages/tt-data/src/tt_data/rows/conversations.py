"""The cells of a row, and the conversations in them, as OpenAI and sharegpt write them, to ``Message``.

Columns have our names; ``columns`` says what the row calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from tt_data.examples import BadRowError, Columns, Conversation, Row, is_empty
from tt_data.messages import ROLES, Message, normal_role
from tt_data.rows.calls import KNOWN, call_as_turn, check_calls, is_call, joined, read_tools, result_as_text
from tt_data.rows.json_values import load_json, read_json
from tt_data.wording import names_of

CHAT_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
_HUGE = 10**4000  # Python writes no longer numbers
_MOST_TURNS = 1000  # finding the trained tokens takes time that grows with their square
# Keys that switch the loss of a turn on or off, as tools spell them: True trains, or True masks.
_TRAINS = (
    "weight", "loss", "loss_weight", "loss_mask", "compute_loss", "train", "training", "trainable", "is_trainable",
    "train_on", "train_on_turn",
)  # fmt: skip
_MASKS = ("masked", "mask", "is_masked", "ignore", "ignore_loss", "no_loss")
_PARTS_OF_A_TURN = ("train_detail", "training_detail", "train_details", "training_details")


# ---- the cells of a row ------------------------------------------------------------------------------------------


class TrackedColumns(dict[str, str]):
    """Our column names to the row's, and which columns of a row ``cell`` has read since ``read`` was last emptied."""

    read: set[str]


def find(row: Row, columns: Columns, *names: str) -> str | None:
    """The row's column for the first of our ``names`` that it has a value for, else that it has at all. Reads none."""
    present = [theirs for name in names if (theirs := columns.get(name, name)) in row]
    if len(present) > 1:
        return next((theirs for theirs in present if not is_empty(row[theirs])), present[0])
    return present[0] if present else None


def cell(row: Row, columns: Columns, *names: str, optional: bool = False) -> Any:
    """The value of the first of these columns. If the row has none of them: None if ``optional``, else BadRowError."""
    name = find(row, columns, *names)
    if name is None:
        if optional:
            return None
        theirs = columns.get(names[0], names[0])
        raise BadRowError("missing column", f"no column {theirs!r}, the row has {names_of(row)}")
    if isinstance(columns, TrackedColumns):
        columns.read.add(name)
    return row[name]


def text(row: Row, columns: Columns, *names: str, may_be_empty: bool = False) -> str:
    """The text (or the number, as text) of the first of these columns. Raises BadRowError."""
    value = cell(row, columns, *names)
    if isinstance(value, str) and (may_be_empty or (value and not value.isspace())):
        return value
    return as_text(value, find(row, columns, *names) or names[0], may_be_empty=may_be_empty)


def as_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """``value`` of the column ``name`` as text. Raises BadRowError."""
    if value is None:
        if may_be_empty:
            return ""
        raise BadRowError("null", f"column {name!r} is null")
    if isinstance(value, float) and not isfinite(value):
        raise BadRowError("null", f"column {name!r} is {value}")
    if isinstance(value, (int, float)) and abs(value) < _HUGE:
        return str(value)
    if not isinstance(value, str):
        raise BadRowError("wrong type", f"column {name!r} holds {type(value).__name__}, expected text")
    if not value.strip() and not may_be_empty:
        raise BadRowError("empty", f"column {name!r} is empty")
    return value


def numbers(row: Row, columns: Columns, name: str) -> list[int] | None:
    """The list of whole numbers in a column, None if the row has none. Raises BadRowError."""
    values = cell(row, columns, name, optional=True)
    if values is None:
        return None
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(v, int) or v in (0.0, 1.0) for v in values):
        raise BadRowError("wrong type", f"column {columns.get(name, name)!r} is not a list of whole numbers")
    return [int(value) for value in values]


# ---- conversations -----------------------------------------------------------------------------------------------


def read_chat(row: Row, columns: Columns) -> Conversation:
    """messages (OpenAI) or conversations (sharegpt), with tools and template variables if there are any."""
    return conversation(row, columns, read_messages(cell(row, columns, *CHAT_COLUMNS)))


def conversation(row: Row, columns: Columns, messages: Sequence[Message]) -> Conversation:
    """``messages`` with the system message, the tools and the template's variables of the row's other columns."""
    if len(row) == 1:
        return Conversation(messages)
    system, first = cell(row, columns, *SYSTEM, optional=True), messages[0]
    if system is not None and as_text(system, find(row, columns, *SYSTEM) or "", may_be_empty=True).strip():
        if first.role != "system":
            messages = [Message("system", str(system)), *messages]
        elif first.content.strip() != str(system).strip():
            name = find(row, columns, *SYSTEM)
            raise BadRowError("two system messages", f"column {name!r} and the first message differ; keep one of them")
    tools = cell(row, columns, *TOOLS, optional=True)
    if tools is not None:
        are_functions = find(row, columns, *TOOLS) == columns.get("functions", "functions")
        tools = read_tools(tools, are_functions=are_functions)
    variables = cell(row, columns, "chat_template_kwargs", optional=True) or {}
    if not isinstance(variables, Mapping):
        raise BadRowError("wrong type", f"chat_template_kwargs holds {type(variables).__name__}, expected an object")
    return Conversation(messages, tools, variables)


def read_messages(turns: Any) -> list[Message]:
    """Messages from ``[{"role", "content"}]`` or ``[{"from", "value"}]``. Raises BadRowError naming the turn.

    ``weight: 0`` (OpenAI), ``train: false``, ``masked: true`` and their like mask a turn; content lists are joined if
    they are text; calls in the older ``function_call`` and in sharegpt's turns of that name become ``tool_calls``.
    """
    if isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        turns = read_json(turns, "messages")
    if isinstance(turns, Mapping):
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
        if messages and messages[-1].role == "assistant" and is_call(turn):
            message = joined(messages.pop(), message, i)
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


def as_turns(value: Any) -> list[Any] | None:
    """The turns in a column, as a list (also from JSON text, or a single turn); None if it is something else."""
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return None
        try:
            value = load_json(value)
        except ValueError:
            return None
    if isinstance(value, Mapping):
        value = _by_turn(value)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return None
    if all(isinstance(t, Message) or (isinstance(t, Mapping) and ("role" in t or "from" in t)) for t in turns):
        return list(turns)
    return None


def turns_or_text(row: Row, columns: Columns, *names: str) -> Any:
    """The turns (as a list) or the value of the first of these columns. Raises BadRowError if the row has none."""
    value = cell(row, columns, *names)
    return as_turns(value) or value


def _by_turn(value: Mapping[str, Any]) -> Any:
    """``{"role": [...], "content": [...]}``, as columnar files may hold turns, as a list of turns."""
    if value and all(isinstance(column, list) for column in value.values()):
        same = len({len(column) for column in value.values()}) == 1
        if same and ("role" in value or "from" in value):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value


def _message(turn: Any, i: int) -> Message:
    if isinstance(turn, Message):
        return turn
    if type(turn) is dict and len(turn) == 2 and turn.get("role") in ("system", "user", "assistant"):
        words = turn.get("content")
        if type(words) is str and not words[:1].isspace() and words:
            return Message(turn["role"], words)  # as nearly every one is; what follows gives the same, in more time
    if not isinstance(turn, Mapping):
        raise BadRowError(
            "wrong type", f"message {i} is {type(turn).__name__}, expected an object with role and content"
        )
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise BadRowError("missing column", f"message {i} has no role, only {names_of(turn)}")
    if role not in ROLES:
        turn, role = (call_as_turn(turn, i), "assistant") if is_call(turn) else (turn, _role(role, i))
    masked, asked, extra = False, False, dict[str, Any]()
    if more := {key: value for key, value in turn.items() if key not in KNOWN and value is not None}:
        masked, asked, extra = _beside_words(more, i)
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if content is None and role in ("system", "tool") and all(turn.get(key) is None for key in ("value", "text")):
        content = ""  # a tool may return nothing
    if role == "tool" and not isinstance(content, str):
        content = result_as_text(content)
    if content is None:
        if "tool_calls" not in extra:
            raise BadRowError("null", f"the content of message {i} is null")
        content, extra["content"] = "", None  # the template must not find any words, not even empty ones
    if not isinstance(content, str):
        if not isinstance(content, Sequence):
            raise BadRowError("wrong type", f"the content of message {i} is {type(content).__name__}, expected text")
        extra["content"] = [_part(part, i) for part in content]  # for templates that read parts
        content = "".join(part["text"] for part in extra["content"])
    if role == "assistant" and not content.strip() and "tool_calls" not in extra:
        raise BadRowError("empty", f"the assistant message {i} is empty")
    return Message(role, content, masked, extra, asked)


def _role(role: Any, i: int) -> str:
    try:
        return normal_role(role)
    except ValueError as error:
        raise BadRowError("unknown role", f"message {i}: {error}") from None


def _part(part: Any, i: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return {"type": "text", **{key: value for key, value in part.items() if value is not None}}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRowError("not text", f"message {i} has a part of type {kind!r}; only text is supported")


def _beside_words(more: Mapping[str, Any], i: int) -> tuple[bool, bool, dict[str, Any]]:
    """Of the keys of a turn beside its role and its words: whether one switches its loss off, whether one says that it
    is trained, and what templates may read."""
    for key in _PARTS_OF_A_TURN:
        if more.get(key):
            raise BadRowError(
                "wrong weight", f"message {i} has {key}: only whole turns can be masked, not parts of them"
            )
    masked = asked = False
    for key in (*_TRAINS, *_MASKS):
        value = more.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise BadRowError("wrong weight", f"message {i} has {key} {value!r}, expected 0 or 1 (true or false)")
        is_off = bool(value) == (key in _MASKS)
        masked, asked = masked or is_off, asked or not is_off
    extra = {key: value for key, value in more.items() if key not in _LOSS_KEYS}
    older = extra.pop("function_call", None)
    if older is not None and not extra.get("tool_calls"):
        extra["tool_calls"] = [{"type": "function", "function": older}]
    if extra.get("tool_calls"):
        extra["tool_calls"] = check_calls(extra["tool_calls"], i)
    else:
        extra.pop("tool_calls", None)  # an empty list is not a call
    return masked, asked and not masked, extra


_LOSS_KEYS = frozenset((*_TRAINS, *_MASKS, *_PARTS_OF_A_TURN))
