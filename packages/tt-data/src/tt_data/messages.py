"""A conversation is a list of ``Message``. ``validate_messages`` checks that a model can learn from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tt_data.wording import nearest

TrainOn = Literal["assistant", "last", "all"]  # which turns of a conversation give loss
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPELLINGS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("ipython", "observation", "function", "function_response", "function_result"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result"), "tool"),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``masked`` turns give no loss. ``extra``: what templates also read (``tool_calls``,
    ``reasoning_content``, ``name``, ...). ``asked``: the row itself says that the turn is trained; it is reported if
    the turn is not."""

    role: str
    content: str
    masked: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    asked: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(unknown_role(self.role))

    def to_dict(self) -> dict[str, Any]:
        """The dict that a chat template sees."""
        return {"role": self.role, "content": self.content, **self.extra}


def unknown_role(role: object) -> str:
    """The message for a role that is not one of ``ROLES``, with the nearest one."""
    role = role if len(str(role)) < 80 else f"{str(role)[:80]}..."
    known = _SPELLINGS.get(str(role).lower())
    if known is None:
        known = nearest(str(role).lower(), [*ROLES, *_SPELLINGS])
        known = _SPELLINGS.get(known, known) if known else None
    hint = f"; did you mean {known!r}?" if known else ""
    return f"unknown role {role!r}, expected one of {', '.join(ROLES)}{hint}"


def normal_role(role: object) -> str:
    """``role`` in our spelling (sharegpt's human and gpt, Llama's ipython, ...). Raises ValueError if it is unknown."""
    name = str(role).strip().lower() if isinstance(role, str) else str(role)
    name = _SPELLINGS.get(name, name)
    if name not in ROLES:
        raise ValueError(unknown_role(role))
    return name


def is_role(name: object) -> bool:
    """Whether ``name`` is a role, in our spelling or another."""
    return isinstance(name, str) and _SPELLINGS.get(name.strip().lower(), name.strip().lower()) in ROLES


def roles_of(messages: Sequence[Message]) -> str:
    """``user, assistant, user`` (shortened), to show the shape of a conversation in an error."""
    names = [message.role for message in messages[:8]]
    return ", ".join(names) + (", ..." if len(messages) > 8 else "")


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError unless the only system message comes first, turns alternate, and all but assistant turns have
    content. A tool's answers may follow an assistant turn, and any number of them each other."""
    if len(messages) < 2:
        raise ValueError(f"a conversation needs at least 2 messages, got {len(messages)}")
    last = None
    for i, message in enumerate(messages):
        role, problem = message.role, ""
        if role == "system" and any(earlier.role == "system" for earlier in messages[:i]):
            problem = "a second system message"
        elif role in ("system", "developer") and i > 0 and last not in ("system", "developer"):
            problem = f"{role} must come first, found"
        elif role == "assistant" and last not in ("user", "tool"):
            problem = "two assistant turns in a row" if last == "assistant" else "assistant before any user turn"
        elif role == "user" and last == "user":
            problem = "two user turns in a row"
        elif role == "tool" and last not in ("assistant", "tool"):
            problem = "a tool answer without an assistant turn before it"
        if problem:
            raise ValueError(f"{problem} at message {i} (roles: {roles_of(messages)})")
        if role not in ("assistant", "tool") and not message.content.strip():
            raise ValueError(f"the {role} message {i} is empty")
        last = role


def mask_messages(messages: Sequence[Message], train_on: TrainOn) -> list[Message]:
    """The messages; those that ``train_on`` leaves out are masked. A message that is already masked stays masked."""
    if train_on == "all":
        return list(messages)
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    kept = {last} if train_on == "last" else {i for i, m in enumerate(messages) if m.role == "assistant"}
    return [
        m if i in kept or m.masked else Message(m.role, m.content, True, m.extra, m.asked)  # replace is slower
        for i, m in enumerate(messages)
    ]
