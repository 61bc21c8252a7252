"""Chat formats for models that bring no chat template: as text around messages, and as built-in Jinja templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from tt_data.messages import Message


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

_MERGE_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
)
_INST = "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{- '[INST] ' "
CHAT_TEMPLATES = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
        "{%- if message['role'] == 'assistant' -%}{{- turn_end -}}{%- endif -%}{{- '\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    "llama2": _MERGE_SYSTEM + _INST + (
        "+ ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') "
        "+ message['content'] + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + message['content'] + ' ' + eos_token -}}"
        "{%- if not loop.last -%}{{- bos_token -}}{%- endif -%}{%- endif -%}{%- endfor -%}"
    ),
    "mistral": _MERGE_SYSTEM + _INST + (
        "+ (system + '\n\n' if loop.first and system else '') + message['content'] + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
    ),
    "llama3": (
        "{{- bos_token -}}{%- for message in messages -%}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
    ),
    "gemma": _MERGE_SYSTEM + (
        "{{- bos_token -}}{%- for message in messages -%}"
        "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
        "+ (system + '\n\n' if loop.first and system else '') + message['content'] | trim + '<end_of_turn>\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
    "plain": (
        "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{{- 'Assistant: ' + message['content'] + eos_token + '\n\n' -}}"
        "{%- else -%}{{- message['role'] | capitalize + ': ' + message['content'] + '\n\n' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
    ),
}  # fmt: skip


def resolve_template(name: str) -> tuple[dict[str, str], str]:
    """The templates for a built-in name or a ``.jinja`` file, and what to call them in messages."""
    if name in CHAT_TEMPLATES:
        return {"default": CHAT_TEMPLATES[name]}, f"built-in template {name}"
    path = Path(name)
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such template file (looked from {Path.cwd()})")
        return {"default": path.read_text(encoding="utf-8")}, str(path)
    near = get_close_matches(name, CHAT_TEMPLATES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown template {name!r}, expected one of {', '.join(CHAT_TEMPLATES)} or a .jinja file{hint}")


def register_chat_template(name: str, source: str) -> None:
    """Make a Jinja chat template known by ``name``."""
    CHAT_TEMPLATES[name] = source


def get_chat_format(name: str) -> type[Llama2ChatFormat] | type[MistralChatFormat] | type[ChatMLFormat]:
    """A registered chat format. Raises ValueError with the nearest name."""
    if name in CHAT_FORMATS:
        return CHAT_FORMATS[name]  # type: ignore[return-value]
    near = get_close_matches(name.lower(), CHAT_FORMATS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown chat format {name!r}, expected one of {', '.join(CHAT_FORMATS)}{hint}")
