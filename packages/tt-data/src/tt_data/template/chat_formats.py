"""Chat formats as text around messages, for models that know no such format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from tt_data.messages import Message
from tt_data.template.instruct import our_name


class Llama2ChatFormat:
    """``[INST] <<SYS>>...<</SYS>> user [/INST] assistant``; the system text stands in the first user turn only."""

    @classmethod
    def format(cls, messages: Sequence[Message]) -> list[Message]:
        """The messages with the format's text around their content; the system message becomes part of a user's."""
        formatted: list[Message] = []
        system = ""
        for message in messages:
            if message.role == "system":
                system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
            elif message.role == "user":
                formatted.append(replace(message, content=f"[INST] {system}{message.content} [/INST] "))
                system = ""
            else:
                formatted.append(message)
        return formatted


class MistralChatFormat:
    """``[INST] user [/INST] assistant``; knows no system message."""

    @classmethod
    def format(cls, messages: Sequence[Message]) -> list[Message]:
        """The messages with the format's text around their content. Raises ValueError for a system message."""
        formatted: list[Message] = []
        for i, message in enumerate(messages):
            if message.role == "system":
                raise ValueError(f"the Mistral format has no system message, found one at message {i}")
            text = f"[INST] {message.content} [/INST] " if message.role == "user" else message.content
            formatted.append(replace(message, content=text))
        return formatted


class ChatMLFormat:
    """``<|im_start|>role ... <|im_end|>`` as plain text."""

    @classmethod
    def format(cls, messages: Sequence[Message]) -> list[Message]:
        """The messages with the format's text around their content."""
        return [
            replace(m, content=f"<|im_start|>{m.role}\n{m.content}<|im_end|>" + ("" if m.role == "assistant" else "\n"))
            for m in messages
        ]


CHAT_FORMATS = {"llama2": Llama2ChatFormat, "mistral": MistralChatFormat, "chatml": ChatMLFormat}


def get_chat_format(name: str) -> type[Llama2ChatFormat] | type[MistralChatFormat] | type[ChatMLFormat]:
    """A registered chat format, by our name or torchtune's. Raises ValueError with the nearest name."""
    name = our_name(name)
    if name in CHAT_FORMATS:
        return CHAT_FORMATS[name]  # type: ignore[return-value]
    near = get_close_matches(name.lower(), CHAT_FORMATS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown chat format {name!r}, expected one of {', '.join(CHAT_FORMATS)}{hint}")
