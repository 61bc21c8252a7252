"""Fixed prompts: instruct templates for rows with columns such as ``instruction``, and chat formats as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tt_data.messages import Message
from tt_data.wording import did_you_mean, names_of

Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class InstructTemplate:
    """A prompt written from the ``columns`` of a row. ``format(row, column_map)`` reads the mapped columns."""

    columns: tuple[str, ...]
    write: Callable[[Mapping[str, str]], str]
    optional: tuple[str, ...] = ()

    def format(self, sample: Row, column_map: Mapping[str, str] | None = None) -> str:
        """The prompt. Raises ValueError for a column that is not in the row."""
        names = {column: (column_map or {}).get(column, column) for column in self.columns}
        missing = [name for column, name in names.items() if column not in self.optional and sample.get(name) is None]
        if missing:
            raise ValueError(f"no column {missing[0]!r}, the row has {names_of(sample)}")
        return self.write({column: str(sample.get(name) or "") for column, name in names.items()})


def _alpaca(row: Mapping[str, str]) -> str:
    if row["input"]:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n### Response:\n"
    )


AlpacaInstructTemplate = InstructTemplate(("instruction", "input"), _alpaca, optional=("input",))
GrammarErrorCorrectionTemplate = InstructTemplate(
    ("sentence",), lambda row: f"Correct this to standard English: {row['sentence']}\n---\nCorrected: "
)
SummarizeTemplate = InstructTemplate(
    ("dialogue",), lambda row: f"Summarize this dialogue:\n{row['dialogue']}\n---\nSummary:\n"
)

StackExchangedPairedTemplate = InstructTemplate(("prompt",), lambda row: f"Question: {row['prompt']}\n\nAnswer: ")

INSTRUCT_TEMPLATES = {
    "alpaca": AlpacaInstructTemplate,
    "grammar": GrammarErrorCorrectionTemplate,
    "summarize": SummarizeTemplate,
    "stack_exchange_paired": StackExchangedPairedTemplate,
}

_TORCHTUNE = {
    "AlpacaInstructTemplate": "alpaca",
    "GrammarErrorCorrectionTemplate": "grammar",
    "SummarizeTemplate": "summarize",
    "StackExchangedPairedTemplate": "stack_exchange_paired",
    "Llama2ChatFormat": "llama2",
    "MistralChatFormat": "mistral",
    "ChatMLFormat": "chatml",
}


def our_name(template: str) -> str:
    """Our name of a template or chat format that is given as torchtune's class (``torchtune.data.ChatMLFormat``)."""
    return _TORCHTUNE.get(template.rpartition(".")[2], template)


def get_instruct_template(name: str) -> InstructTemplate:
    """A registered template, by our name or torchtune's. Raises ValueError with the nearest name."""
    return _named(name, INSTRUCT_TEMPLATES, "instruct template")


def register_instruct_template(name: str, template: InstructTemplate) -> None:
    """Register ``template`` under ``name``."""
    INSTRUCT_TEMPLATES[name] = template


class Llama2ChatFormat:
    """``[INST] <<SYS>>...<</SYS>> user [/INST] assistant``; the system text is in the first user turn only."""

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
    """``[INST] user [/INST] assistant``, without a system message."""

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


ChatFormat = type[Llama2ChatFormat] | type[MistralChatFormat] | type[ChatMLFormat]
CHAT_FORMATS: dict[str, ChatFormat] = {"llama2": Llama2ChatFormat, "mistral": MistralChatFormat, "chatml": ChatMLFormat}


def get_chat_format(name: str) -> ChatFormat:
    """A registered chat format, by our name or torchtune's. Raises ValueError with the nearest name."""
    return _named(name, CHAT_FORMATS, "chat format")


def _named(name: str, known: Mapping[str, T], kind: str) -> T:
    name = our_name(name)
    if name not in known:
        hint = did_you_mean(name.lower(), known)
        raise ValueError(f"unknown {kind} {name!r}, expected one of {', '.join(known)}{hint}")
    return known[name]
