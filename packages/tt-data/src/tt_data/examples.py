"""What a row says, whatever its columns are called: a conversation, a prompt with its completion, text, or ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tt_data.messages import Message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, with the tools and further variables that the chat template may read."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


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


Example = Conversation | Turns | Completion | Text | Tokens | Pair | Judged


def is_chat(example: Example) -> bool:
    """Whether the chat template makes text of it."""
    if isinstance(example, Pair):
        return isinstance(example.chosen, Conversation)
    return isinstance(example.answer if isinstance(example, Judged) else example, Conversation)


class BadRowError(ValueError):
    """A row that cannot be learned from; ``reason`` is the short name that reports count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
