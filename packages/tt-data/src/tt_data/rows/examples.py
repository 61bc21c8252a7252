"""What a row says, whatever its columns are called: a conversation, a prompt with its completion, text, or ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tt_data.messages import Message
from tt_data.wording import visible


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
    """Ids that somebody else made, with labels (-100: no loss)."""

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
Example = Conversation | Turns | Completion | Text | Tokens | Pair | Judged


def kind_of(example: Example) -> Kind:
    """What a row of it holds: ``single``, ``pair`` (chosen and rejected) or ``judged``."""
    return "judged" if isinstance(example, Judged) else "pair" if isinstance(example, Pair) else "single"


def mistake_in(example: object) -> str | None:
    """What is wrong with the return value of a converter, None if nothing is."""
    if isinstance(example, Pair):
        return mistake_in(example.chosen) or mistake_in(example.rejected)
    if isinstance(example, Judged):
        return mistake_in(example.answer)
    if isinstance(example, (Conversation, Turns)):
        messages = (*example.messages, *example.formatted) if isinstance(example, Turns) else example.messages
        wrong = next((message for message in messages if not isinstance(message, Message)), None)
        return None if wrong is None else f"a message is {type(wrong).__name__}, expected Message"
    if isinstance(example, (Completion, Text)):
        texts: tuple[object, ...] = (
            (example.text,) if isinstance(example, Text) else (example.prompt, example.completion)
        )
        found = next((text for text in texts if not isinstance(text, str)), "")
        return None if isinstance(found, str) else f"a text of {type(example).__name__} is {type(found).__name__}"
    if isinstance(example, Tokens):
        return None
    kinds = ", ".join(kind.__name__ for kind in (Conversation, Completion, Text, Tokens, Pair, Judged))
    return f"it returned {type(example).__name__}, expected one of {kinds}"


def notes_of(example: Example) -> tuple[str, ...]:
    """What of the row is not in the example."""
    if isinstance(example, Pair):
        return (*notes_of(example.chosen), *notes_of(example.rejected))
    if isinstance(example, Judged):
        return notes_of(example.answer)
    return example.notes if isinstance(example, Conversation) else ()


def is_chat(example: Example) -> bool:
    """Whether the chat template makes text of it."""
    if isinstance(example, Pair):
        return isinstance(example.chosen, Conversation)
    return isinstance(example.answer if isinstance(example, Judged) else example, Conversation)


class BadRowError(ValueError):
    """A row that cannot be learned from; ``reason`` is the short name that reports count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(visible(detail))
        self.reason = reason
