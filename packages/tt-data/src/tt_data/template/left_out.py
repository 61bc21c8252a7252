"""What of a conversation a chat template does not write.

It is found by rendering: every part of the conversation gets a mark, and the marks that are not in the text say what is
left out.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
TextWith = Callable[[int, Any], str | None]
Write = Callable[[Messages, Any, Any], str]  # (messages, tools, the template's other variables) -> text

REASONING = ("reasoning_content", "thinking", "reasoning")
SHORT = 12  # characters: a shorter text is easily found in one that does not contain it
_STEM = "".join(str(secrets.randbelow(10)) for _ in range(18))  # digits: the same in capitals and inside JSON


@dataclass
class Losses:
    """What a text does not contain: ``kinds`` by name, and the messages of which nothing is left (``empty``)."""

    kinds: list[str] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)


def text_of(content: Any) -> str:
    """The words of a message's content."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else ""


def like(content: Any, words: str) -> Any:
    """``words`` in the form of ``content``."""
    return part_of(words) if isinstance(content, list) else words


def part_of(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def call_with(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    function = {**function, "arguments": change(function["arguments"])}
    return {**call, "function": function} if "function" in call else function


def other_form(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


class Marks:
    """Numbered strings, one behind every part of a conversation, and the kind of each part."""

    def __init__(self) -> None:
        self._given: list[tuple[str, str, int]] = []  # mark, kind, message
        self._enclosed: list[str] = []  # the text if a template put a call's JSON text into a second pair of braces

    def new(self, kind: str, message: int) -> str:
        mark = f"{_STEM}{len(self._given):06d}"
        self._given.append((mark, kind, message))
        return mark

    def message(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        if text_of(message.get("content")).strip():
            marked["content"] = self._content(
                message["content"], "tool results" if message["role"] == "tool" else "words", i
            )
        reasoning = {
            name: message[name] for name in REASONING if isinstance(message.get(name), str) and message[name].strip()
        }
        if reasoning:
            mark = self.new("reasoning", i)
            marked |= {name: text + mark for name, text in reasoning.items()}
        if message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, i) for call in message["tool_calls"]]
        return marked

    def _content(self, content: Any, kind: str, i: int) -> Any:
        if isinstance(content, str):
            return content + self.new(kind, i)
        return [
            part if not text_of([part]).strip()
            else part + self.new(kind, i) if isinstance(part, str)
            else {**part, "text": part["text"] + self.new(kind, i)}
            for part in content
        ]  # fmt: skip

    def _call(self, call: dict[str, Any], i: int) -> dict[str, Any]:
        """The mark is one more argument, and it follows each argument. Without arguments it follows the name."""
        function = call.get("function", call)
        arguments = function.get("arguments")
        given = other_form(arguments) if isinstance(arguments, str) else arguments
        mark = self.new("tool calls", i)
        if isinstance(given, dict) and given:
            more = {key: value + mark if isinstance(value, str) else value for key, value in given.items()}
            more[mark] = mark
            written = json.dumps(more, ensure_ascii=False)
            self._enclosed.append(f"{{{written}")
            return call_with(call, lambda old: written if isinstance(old, str) else more)
        if isinstance(arguments, str) and arguments.strip() not in ("", "{}"):
            return call_with(call, lambda old: old + mark)
        function = {**function, "name": f"{function.get('name')}{mark}"}
        return {**call, "function": function} if "function" in call else function

    def tools(self, tools: Any) -> Any:
        if not tools:
            return tools
        marked = []
        for tool in tools:
            inner = tool.get("function")
            mark = self.new("tools", -1)
            named = isinstance(inner, dict)
            changed = {**(inner if named else tool), "name": f"{(inner if named else tool).get('name')}{mark}"}
            marked.append({**tool, "function": changed} if named else changed)
        return marked

    def missing_in(self, text: str) -> Losses:
        """A call is also left out if its JSON text was escaped once more, or put into a second pair of braces."""
        doubled = any(enclosed in text for enclosed in self._enclosed)
        lost = [
            (kind, i)
            for mark, kind, i in self._given
            if mark not in text or (kind == "tool calls" and (doubled or f'\\"{mark}' in text))
        ]
        parts = [i for _, _, i in self._given if i >= 0]
        gone = [i for _, i in lost]
        empty = [i for i in dict.fromkeys(parts) if gone.count(i) == parts.count(i)]
        return Losses(list(dict.fromkeys(kind for kind, _ in lost)), empty)


def left_out(write: Write, messages: Messages, tools: Any, extra: Any) -> Losses | None:
    """What the template does not write of a conversation; None if it fails on it with marks."""
    marks = Marks()
    marked = [marks.message(i, message) for i, message in enumerate(messages)]
    try:
        losses = marks.missing_in(write(marked, marks.tools(tools), extra))
    except Exception:
        return None

    def text_with(i: int, content: Any) -> str | None:
        """The conversation with other content in turn ``i``; None if the template fails on it."""
        try:
            return write([*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]], tools, extra)
        except Exception:
            return None

    losses.empty = [i for i in losses.empty if not _writes_words(messages[i], i, text_with)]
    if "reasoning" not in losses.kinds and any(_drops_thought(m, i, text_with) for i, m in enumerate(messages)):
        losses.kinds.append("reasoning")
    return losses


def _writes_words(message: dict[str, Any], i: int, text_with: TextWith) -> bool:
    """Whether something of a turn is written although the mark at its end is not: the template cuts it."""
    if not text_of(message.get("content")).strip():
        return False
    mark = Marks().new("words", i)
    text = text_with(i, like(message["content"], mark))
    return text is not None and mark[:SHORT] in text


def _drops_thought(message: dict[str, Any], i: int, text_with: TextWith) -> bool:
    """A thought at the beginning of an answer's words may be cut off: a mark at their end does not show it."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return False
    thought, closed, _ = content.partition("</think>")
    if not closed or not thought.replace("<think>", "").strip():
        return False
    mark = Marks().new("reasoning", i)
    text = text_with(i, content.replace(closed, mark + closed, 1))
    return text is not None and mark not in text
