"""A row, its cells by our column names, and what it says: a conversation, a prompt and its completion, text, or ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from tt_data.messages import Message
from tt_data.wording import names_of, visible

Row = Mapping[str, Any]
Columns = Mapping[str, str]  # our column name to theirs
_HUGE = 10**4000  # Python writes no longer numbers


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, with the tools and further variables that the chat template may read. ``notes``: what of the row is
    not in them, worded as ``Tally.note`` says."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Turns:
    """Messages, and the same with a chat format's text around their content, to be encoded one by one."""

    messages: Sequence[Message]
    formatted: Sequence[Message]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what is to follow it, both plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids from another program, with labels (-100: no loss)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Pair:
    """The better and the worse answer to one prompt."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer and whether it was wanted."""

    answer: Conversation | Completion
    desirable: bool


Kind = Literal["single", "pair", "judged"]
Answer = Conversation | Turns | Completion | Text | Tokens
Example = Answer | Pair | Judged


def kind_of(example: Example) -> Kind:
    """What a row of it holds: ``single``, ``pair`` (chosen and rejected) or ``judged``."""
    return "judged" if isinstance(example, Judged) else "pair" if isinstance(example, Pair) else "single"


def answers_of(example: Example) -> Sequence[Answer]:
    """The two answers of a pair, the one that is judged, or the example itself."""
    if isinstance(example, Pair):
        return example.chosen, example.rejected
    return (example.answer if isinstance(example, Judged) else example,)


def mistake_in(example: object) -> str | None:
    """What is wrong with the return value of a converter, None if nothing is."""
    answers: Sequence[object] = answers_of(example) if isinstance(example, (Pair, Judged)) else (example,)
    for answer in answers:
        if isinstance(answer, (Conversation, Turns)):
            messages = (*answer.messages, *answer.formatted) if isinstance(answer, Turns) else answer.messages
            wrong = next((message for message in messages if not isinstance(message, Message)), None)
            if wrong is not None:
                return f"a message is {type(wrong).__name__}, expected Message"
        elif isinstance(answer, (Completion, Text)):
            texts: tuple[object, ...] = (
                (answer.text,) if isinstance(answer, Text) else (answer.prompt, answer.completion)
            )
            found = next((text for text in texts if not isinstance(text, str)), "")
            if not isinstance(found, str):
                return f"a text of {type(answer).__name__} is {type(found).__name__}"
        elif not isinstance(answer, Tokens):
            kinds = ", ".join(kind.__name__ for kind in (Conversation, Completion, Text, Tokens, Pair, Judged))
            return f"it returned {type(answer).__name__}, expected one of {kinds}"
    return None


class BadRowError(ValueError):
    """A row that cannot be learned from; ``reason`` is the short name that reports count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(visible(detail))
        self.reason = reason


# ---- the cells of a row ------------------------------------------------------------------------------------------


class TrackedRow(Mapping[str, Any]):
    """A row that knows which of its columns have been read; asking whether there is one reads nothing."""

    __slots__ = ("_row", "seen")

    def __init__(self, row: Row) -> None:
        self._row, self.seen = row, set[str]()

    def __getitem__(self, name: str) -> Any:
        value = self._row[name]
        self.seen.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def peek(self, name: str) -> Any:
        """The value of a column, which stays unread."""
        return self._row.get(name)

    def unread(self) -> list[str]:
        """The columns that hold something and were not read."""
        return [str(name) for name, value in self._row.items() if name not in self.seen and not is_empty(value)]


def is_empty(value: Any) -> bool:
    """Null, or nothing in it: nothing is lost with it."""
    return value is None or (isinstance(value, (str, list, dict, tuple)) and not value)


def find(row: Row, columns: Columns, *names: str) -> str | None:
    """The row's column for the first of our ``names`` that it has a value for, else that it has at all. Reads none."""
    peek = row.peek if isinstance(row, TrackedRow) else row.get
    first = None
    for name in names:
        theirs = columns.get(name, name)
        if theirs in row:
            if not is_empty(peek(theirs)):
                return theirs
            first = first or theirs
    return first


def optional(row: Row, columns: Columns, *names: str) -> Any:
    """The value of the first of these columns, None if the row has none of them."""
    name = find(row, columns, *names)
    return None if name is None else row[name]


def cell(row: Row, columns: Columns, *names: str) -> Any:
    """The same. Raises BadRowError if the row has none of them."""
    name = find(row, columns, *names)
    if name is None:
        theirs = columns.get(names[0], names[0])
        raise BadRowError("missing column", f"no column {theirs!r}, the row has {names_of(row)}")
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
    values = optional(row, columns, name)
    if values is None:
        return None
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not all(isinstance(v, int) or v in (0.0, 1.0) for v in values):
        raise BadRowError("wrong type", f"column {columns.get(name, name)!r} is not a list of whole numbers")
    return [int(value) for value in values]
