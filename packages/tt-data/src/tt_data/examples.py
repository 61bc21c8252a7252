"""What a row says: a conversation, a prompt and its completion, text, or ids; one answer, or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from tt_data.messages import Message
from tt_data.wording import visible

Row = Mapping[str, Any]
Columns = Mapping[str, str]  # our column name to theirs
Kind = Literal["single", "pair", "judged"]  # what a row holds: an answer, a chosen and a rejected one, one with a label


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

    kind: ClassVar[Kind] = "pair"
    chosen: Conversation | Completion
    rejected: Conversation | Completion

    @property
    def answers(self) -> Sequence[Conversation | Completion]:
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer and whether it was wanted."""

    kind: ClassVar[Kind] = "judged"
    answer: Conversation | Completion
    desirable: bool

    @property
    def answers(self) -> Sequence[Conversation | Completion]:
        return (self.answer,)


Answer = Conversation | Turns | Completion | Text | Tokens
Example = Answer | Pair | Judged


def mistake_in(example: object) -> str | None:
    """What is wrong with the return value of a converter, None if nothing is."""
    answers: Sequence[object] = example.answers if isinstance(example, (Pair, Judged)) else (example,)
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


def is_empty(value: Any) -> bool:
    """Null, or nothing in it: nothing is lost with it."""
    return value is None or (isinstance(value, (str, list, dict, tuple)) and not value)
