"""Rows as people have them to ``Example``: which schema the columns are, and how each schema reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from tt_data.conversations import read_messages, read_tools
from tt_data.examples import BadRowError, Completion, Conversation, Example, Judged, Pair, Text, Tokens
from tt_data.messages import Message

Row = Mapping[str, Any]
Columns = Mapping[str, str]
_HUGE = 10**4000  # Python writes no longer numbers


@dataclass(frozen=True)
class Schema:
    """A kind of row: the ``columns`` it needs (in any of their spellings), and ``read``."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Row, Columns], Example]
    values: Callable[[Row, Columns], bool] = lambda row, columns: True

    def matches(self, row: Row, columns: Columns) -> bool:
        return all(any(columns.get(n, n) in row for n in names) for names in self.columns) and self.values(row, columns)


def _cell(row: Row, columns: Columns, *names: str) -> Any:
    """The value of the first of these columns that the row has. Raises BadRowError where it has none."""
    for name in names:
        if columns.get(name, name) in row:
            return row[columns.get(name, name)]
    found = ", ".join(map(repr, row)) or "none"
    raise BadRowError("missing column", f"no column {columns.get(names[0], names[0])!r}, the row has {found}")


def _text(row: Row, columns: Columns, *names: str, may_be_empty: bool = False) -> str:
    value = _cell(row, columns, *names)
    name = columns.get(names[0], names[0])
    if value is None:
        if may_be_empty:
            return ""
        raise BadRowError("null", f"column {name!r} is null")
    if isinstance(value, float) and not isfinite(value):  # as pandas writes what is missing
        raise BadRowError("null", f"column {name!r} is {value}")
    if isinstance(value, (int, float)) and abs(value) < _HUGE:
        return str(value)
    if not isinstance(value, str):
        raise BadRowError("wrong type", f"column {name!r} holds {type(value).__name__}, expected text")
    if not value.strip() and not may_be_empty:
        raise BadRowError("empty", f"column {name!r} is empty")
    return value


def _optional(row: Row, columns: Columns, name: str) -> Any:
    return row.get(columns.get(name, name))


def read_alpaca(row: Row, columns: Columns) -> Conversation:
    """instruction, input, output: one user turn and its answer."""
    instruction = _text(row, columns, "instruction")
    context = _text(row, columns, "input", may_be_empty=True) if columns.get("input", "input") in row else ""
    user = f"{instruction}\n\n{context}" if context else instruction
    messages = [Message("user", user), Message("assistant", _text(row, columns, "output", "response"))]
    system = _optional(row, columns, "system")
    return Conversation([Message("system", str(system)), *messages] if system else messages)


def read_chat(row: Row, columns: Columns) -> Conversation:
    """messages (OpenAI) or conversations (sharegpt), with tools and template variables where there are any."""
    turns = _cell(row, columns, "messages", "conversations", "conversation")
    messages = read_messages(turns)
    system = _optional(row, columns, "system")
    if isinstance(system, str) and system and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    return Conversation(messages, read_tools(_optional(row, columns, "tools")), _variables(row, columns))


def _variables(row: Row, columns: Columns) -> Mapping[str, Any]:
    """What a row says to the chat template itself, such as ``enable_thinking``."""
    variables = _optional(row, columns, "chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise BadRowError("wrong type", f"chat_template_kwargs holds {type(variables).__name__}, expected an object")
    return variables


def read_completion(row: Row, columns: Columns) -> Completion | Conversation:
    """prompt and completion: both text, or both messages."""
    return _answer(row, columns, _cell(row, columns, "prompt"), ("completion", "response"))


def read_text(row: Row, columns: Columns) -> Text:
    """text: all of it is trained."""
    return Text(_text(row, columns, "text"))


def read_tokens(row: Row, columns: Columns) -> Tokens:
    """input_ids, with labels or a mask where there are any."""
    ids = _cell(row, columns, "input_ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise BadRowError("wrong type", "column 'input_ids' holds something else than a list of ids")
    labels = _numbers(row, columns, "labels")
    for name in ("assistant_masks", "completion_mask"):
        mask = _numbers(row, columns, name)
        if labels is None and mask is not None:
            if len(mask) != len(ids):
                raise BadRowError("wrong length", f"{len(ids)} input_ids but {len(mask)} values in {name}")
            labels = [i if keep else -100 for i, keep in zip(ids, mask, strict=True)]
    labels = list(ids) if labels is None else labels
    if len(labels) != len(ids):
        raise BadRowError("wrong length", f"{len(ids)} input_ids but {len(labels)} labels")
    if any(label not in (-100, i) for label, i in zip(labels, ids, strict=True)):
        raise BadRowError(
            "wrong labels", "labels must be -100 or equal to input_ids (they are aligned; the loss shifts)"
        )
    return Tokens(ids, labels)


def _numbers(row: Row, columns: Columns, name: str) -> Sequence[int] | None:
    """The list of numbers in a column, None where the row has none."""
    values = _optional(row, columns, name)
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(v, int) for v in values):
        raise BadRowError("wrong type", f"column {name!r} holds something else than a list of whole numbers")
    return values


def read_pair(row: Row, columns: Columns) -> Pair:
    """chosen and rejected, with a prompt or sharing one."""
    prompt = _optional(row, columns, "prompt")
    chosen, rejected = _cell(row, columns, "chosen"), _cell(row, columns, "rejected")
    if chosen == rejected:
        raise BadRowError("equal answers", "chosen and rejected are the same")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_shared_text(chosen, rejected)
        if not chosen.strip() or not rejected.strip():
            raise BadRowError("empty", "chosen and rejected differ in no answer")
        return Pair(Completion(prompt, chosen), Completion(prompt, rejected))
    sides = {"chosen": chosen, "rejected": rejected}
    built = {
        name: _answer({**row, columns.get(name, name): value}, columns, prompt, (name,))
        for name, value in sides.items()
    }
    return Pair(_last_turn_only(built["chosen"]), _last_turn_only(built["rejected"]))


def read_judged(row: Row, columns: Columns) -> Judged:
    """prompt, completion and a label that says whether the completion was wanted."""
    label, name = _cell(row, columns, "label"), columns.get("label", "label")
    if label is None or label != label:  # null, or NaN
        raise BadRowError("null", f"column {name!r} is null")
    wanted = _judgement(label)
    if wanted is None:
        raise BadRowError("wrong label", f"column {name!r} holds {str(label)[:40]!r}, expected true or false")
    return Judged(_last_turn_only(read_completion(row, columns)), wanted)


def _judgement(label: Any) -> bool | None:
    """What a label says, as JSON, csv (where all is text) and pandas (1.0) write it; None where it says neither."""
    if isinstance(label, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    return bool(label) if isinstance(label, (int, float)) and label in (0, 1) else None


def _answer(row: Row, columns: Columns, prompt: Any, names: tuple[str, ...]) -> Completion | Conversation:
    """A prompt (text, messages, or None) and an answer (text or messages) put together."""
    answer = _cell(row, columns, *names)
    if not isinstance(answer, list) and not isinstance(prompt, list):
        return Completion(_text(row, columns, "prompt", may_be_empty=True), _text(row, columns, *names))
    after = read_messages(answer) if isinstance(answer, list) else [Message("assistant", _text(row, columns, *names))]
    before = read_messages(prompt) if isinstance(prompt, list) else [Message("user", prompt)] if prompt else []
    if after[0].role in ("system", "developer", "user") and (isinstance(prompt, str) or after[: len(before)] == before):
        before = []  # the answer holds its prompt itself
    messages = [*(replace(message, masked=True) for message in before), *after]
    return Conversation(messages, read_tools(_optional(row, columns, "tools")), _variables(row, columns))


def _last_turn_only(answer: Completion | Conversation) -> Completion | Conversation:
    """Preference compares the last answers only: what they share gives no loss."""
    if isinstance(answer, Completion):
        return answer
    *before, last = answer.messages
    if last.role != "assistant":
        raise BadRowError("ends with user", f"the answer ends with a {last.role} turn, expected assistant")
    return replace(answer, messages=[*(replace(m, masked=True) for m in before), last])


def _split_shared_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """An implicit prompt: what both texts begin with, cut after its last assistant marker, else after white space."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    marker = chosen.rfind("\n\nAssistant:", 0, shared)
    if marker >= 0:
        cut = marker + len("\n\nAssistant:")
    else:
        cut = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared)) + 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _is_label(row: Row, columns: Columns) -> bool:
    label = row[columns.get("label", "label")]
    return isinstance(label, (int, float)) or label is None or _judgement(label) is not None


def _is_sharegpt(row: Row, columns: Columns) -> bool:
    turns = next((row[columns.get(n, n)] for n in _CHAT_COLUMNS if columns.get(n, n) in row), None)
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]


_CHAT_COLUMNS = ("messages", "conversations", "conversation")
SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("pretokenized", (("input_ids",),), read_tokens),
        Schema("preference", (("chosen",), ("rejected",)), read_pair),
        Schema("unpaired_preference", (("prompt",), ("completion", "response"), ("label",)), read_judged, _is_label),
        Schema("sharegpt", (_CHAT_COLUMNS,), read_chat, _is_sharegpt),
        Schema("openai", (_CHAT_COLUMNS,), read_chat),
        Schema("alpaca", (("instruction",), ("output", "response")), read_alpaca),
        Schema("prompt_completion", (("prompt",), ("completion", "response")), read_completion),
        Schema("text", (("text",),), read_text),
    )
}


def register_schema(schema: Schema) -> None:
    """Make a kind of row known; it is tried before the others."""
    ours = dict(SCHEMAS)
    SCHEMAS.clear()
    SCHEMAS.update({schema.name: schema, **{name: known for name, known in ours.items() if name != schema.name}})


def known_columns() -> list[str]:
    """Every column name that a schema reads."""
    return sorted(
        {name for schema in SCHEMAS.values() for names in schema.columns for name in names}
        | {"input", "system", "tools"}
    )


def detect_schema(row: Row, columns: Columns, *, where: str) -> Schema:
    """The schema of ``row``. Raises ValueError that names the columns, the known schemas, and the nearest column."""
    unknown = [name for name in columns if name not in known_columns()]
    if unknown:
        near = get_close_matches(unknown[0], known_columns(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"columns: tt_data reads no column {unknown[0]!r}, expected one of {', '.join(known_columns())}{hint}"
        )
    for name, theirs in columns.items():
        if theirs not in row:
            near = get_close_matches(theirs, list(row), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: columns maps {name} to {theirs!r}, but the row has {_names(row)}{hint}")
    for schema in SCHEMAS.values():
        if schema.matches(row, columns):
            return schema
    raise ValueError(f"{where}: {_no_schema(row, columns)}")


def _no_schema(row: Row, columns: Columns) -> str:
    wanted = "; ".join(f"{s.name}: {' + '.join('/'.join(names) for names in s.columns)}" for s in SCHEMAS.values())
    return f"no known schema has the columns {_names(row)}, expected one of ({wanted}){_suggestion(row, columns)}"


def _suggestion(row: Row, columns: Columns) -> str:
    """``columns={"text": "txt"}`` for the schema that lacks least."""
    best: dict[str, str] | None = None
    for schema in SCHEMAS.values():
        guess: dict[str, str] = {}
        for names in schema.columns:
            if any(columns.get(name, name) in row for name in names):
                continue
            near = next((n for name in names for n in get_close_matches(name, map(str, row), 1, 0.5)), None)
            if near is None:
                break
            guess[names[0]] = near
        else:
            if guess and (best is None or len(guess) < len(best)):
                best = guess
    return f"; did you mean columns={best}?" if best else ""


def _names(row: Iterable[str]) -> str:
    return "[" + ", ".join(repr(str(name)) for name in row) + "]"
