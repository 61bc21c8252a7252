"""Conversations in the form that a chat template reads, and what of them it does not write.

Content is text or a list of parts, the arguments of a call are text or an object; templates differ in which they take.
What a template loses is found by rendering: every part of the conversation gets a mark, and some do not come out.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
Write = Callable[[Messages, Any, Any], str]  # (messages, tools, the template's other variables) -> text

_REASONING = ("reasoning_content", "thinking", "reasoning")
_SHORT = 12  # characters: so few are easily found in a text that does not hold them
_STEM = "".join(str(secrets.randbelow(10)) for _ in range(18))  # digits: the same in capitals and inside JSON
_QUESTION, _ANSWER = "zq-question-qz", "zq-answer-qz"


@dataclass
class Losses:
    """What a rendering does not hold: ``kinds`` by name, and the messages of which nothing is left."""

    kinds: list[str] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)


class MessageForms:
    """Knows in which forms one template (``write``) takes content, and tries both for the arguments of calls."""

    def __init__(self, write: Write) -> None:
        self._write = write
        plain = self._writes([_QUESTION, _ANSWER])
        self.takes_parts = self._writes([_part(_QUESTION), _part(_ANSWER)])
        self.wants_parts = self.takes_parts and not plain
        self._in_order = {has_system: self._keeps_order(has_system) for has_system in (False, True)}

    def _writes(self, contents: list[Any]) -> bool:
        try:
            text = self._write(_turns(contents), None, None)
        except Exception:  # of this form, or of any conversation: what it makes of a row is seen there
            return False
        printed = any(f"{quote}{word}{quote}" in text for quote in "'\"" for word in (_QUESTION, _ANSWER))
        return _QUESTION in text and _ANSWER in text and not printed  # not as Python or JSON spells a list

    def _keeps_order(self, has_system: bool) -> bool:
        """Whether every turn is written, one after the other: then it is enough to look for those of a row."""
        words = [f"{_QUESTION}{i}" for i in range(5)]
        turns = [{"role": "system", "content": words[4]}] * has_system + _turns(words[:4])
        words = words[4:] * has_system + words[:4]
        try:
            return _in_order(words, self._write([self._fit_content(turn) for turn in turns], None, None))
        except Exception:
            return False

    def fit(self, messages: Messages, tools: Any, extra: Any) -> tuple[Messages, Losses | None]:
        """``messages`` as this template takes them, and what it loses; None where its text will tell (``losses``).

        Each is given as it is; in another form if the template fails on it or loses something.
        """
        fitted = [self._fit_content(message) for message in messages]
        if not tools and not any(map(_has_more, fitted)):
            return fitted, None
        best: tuple[Messages, Losses] | None = None
        for candidate in _candidates(fitted):
            losses = self._losses(candidate, tools, extra)
            if losses is not None and (best is None or len(losses.kinds) < len(best[1].kinds)):
                best = candidate, losses
            if losses is not None and not losses.kinds:
                break
        return best or (self._first_written(fitted, tools, extra), Losses())

    def losses(self, messages: Messages, extra: Any, text: str) -> Losses:
        """What the template does not write of plain turns, of which it made ``text``."""
        words = [text_of(message.get("content")).strip() for message in messages]
        has_system = messages[0]["role"] == "system"
        if self._in_order[has_system] and all(len(word) >= _SHORT for word in words) and _in_order(words, text):
            return Losses()
        return self._losses(messages, None, extra) or Losses()

    def _losses(self, messages: Messages, tools: Any, extra: Any) -> Losses | None:
        """What is not in the rendering of a marked conversation; None if the template fails on it."""
        marks = _Marks()
        marked = [marks.message(i, message) for i, message in enumerate(messages)]
        try:
            losses = marks.missing_in(self._write(marked, marks.tools(tools), extra))
        except Exception:
            return None
        losses.empty = [i for i in losses.empty if not self._writes_words_of(messages, i, tools, extra)]
        if "reasoning" not in losses.kinds and any(
            self._drops_thought(messages, i, tools, extra) for i in range(len(messages))
        ):
            losses.kinds.append("reasoning")
        return losses

    def _writes_words_of(self, messages: Messages, i: int, tools: Any, extra: Any) -> bool:
        """Whether something of a turn is written although the mark at its end is not: it is cut."""
        if not text_of(messages[i].get("content")).strip():
            return False
        mark = _Marks().new("words", i)
        marked = {**messages[i], "content": like(messages[i]["content"], mark)}
        try:
            return mark[:_SHORT] in self._write([*messages[:i], marked, *messages[i + 1 :]], tools, extra)
        except Exception:
            return False

    def _drops_thought(self, messages: Messages, i: int, tools: Any, extra: Any) -> bool:
        """A thought at the beginning of an answer's words may be cut off: a mark at their end does not show it."""
        content = messages[i].get("content")
        if messages[i]["role"] != "assistant" or not isinstance(content, str):
            return False
        thought, closed, _ = content.partition("</think>")
        if not closed or not thought.replace("<think>", "").strip():
            return False
        mark = _Marks().new("reasoning", i)
        marked = {**messages[i], "content": content.replace(closed, mark + closed, 1)}
        try:
            return mark not in self._write([*messages[:i], marked, *messages[i + 1 :]], tools, extra)
        except Exception:
            return False

    def _first_written(self, fitted: Messages, tools: Any, extra: Any) -> Messages:
        """Where marks are in the template's way: the first form that it does not fail on."""
        for candidate in _candidates(fitted):
            with contextlib.suppress(Exception):
                self._write(candidate, tools, extra)
                return candidate
        return fitted

    def _fit_content(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str) and self.wants_parts:
            return {**message, "content": _part(content)}
        if isinstance(content, list) and not self.takes_parts:
            return {**message, "content": text_of(content)}
        return message


def text_of(content: Any) -> str:
    """The words of a message's content."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else ""


def like(content: Any, words: str) -> Any:
    """``words`` in the form of ``content``."""
    return _part(words) if isinstance(content, list) else words


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _turns(contents: list[Any]) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _in_order(words: list[str], text: str) -> bool:
    position = 0
    for word in words:
        position = text.find(word, position)
        if position < 0:
            return False
        position += len(word)
    return True


def _has_more(message: dict[str, Any]) -> bool:
    """Whether there is more to a message than plain words."""
    is_plain = isinstance(message.get("content"), str) and "</think>" not in message["content"]
    return (
        not is_plain
        or message["role"] == "tool"
        or bool(message.get("tool_calls"))
        or any(message.get(name) for name in _REASONING)
    )


def _candidates(messages: Messages) -> Iterator[Messages]:
    """As it is; then with joined parts, with the arguments of calls in their other form, with both."""
    joined = [_joined(message) for message in messages]
    called = [_with_other_arguments(message) for message in messages]
    yield messages
    if joined != messages:
        yield joined
    if called != messages:
        yield called
        if joined != messages:
            yield [_with_other_arguments(message) for message in joined]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return (
        {**message, "content": _part(text_of(content))} if isinstance(content, list) and len(content) > 1 else message
    )


def _with_other_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are JSON text as the object, and the other way round."""
    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": [_call_with(call, _other_form) for call in calls]}


def _call_with(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    function = {**function, "arguments": change(function["arguments"])}
    return {**call, "function": function} if "function" in call else function


def _other_form(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


class _Marks:
    """Numbered strings put behind every part of a conversation, and the kind of thing that each stands for."""

    def __init__(self) -> None:
        self._given: list[tuple[str, str, int]] = []  # mark, kind, message
        self._enclosed: list[str] = []  # what stands where a call's JSON text was put into one more pair of braces

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
            name: message[name] for name in _REASONING if isinstance(message.get(name), str) and message[name].strip()
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
        """The mark is an argument more, and follows each; of a call without arguments it follows the name."""
        function = call.get("function", call)
        arguments = function.get("arguments")
        given = _other_form(arguments) if isinstance(arguments, str) else arguments
        mark = self.new("tool calls", i)
        if isinstance(given, dict) and given:
            more = {key: value + mark if isinstance(value, str) else value for key, value in given.items()}
            more[mark] = mark
            written = json.dumps(more, ensure_ascii=False)
            self._enclosed.append(f"{{{written}")
            return _call_with(call, lambda old: written if isinstance(old, str) else more)
        if isinstance(arguments, str) and arguments.strip() not in ("", "{}"):
            return _call_with(call, lambda old: old + mark)
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
        """A call whose JSON text was written as a JSON string (escaped once more), or into braces, is a lost one."""
        spoilt = any(enclosed in text for enclosed in self._enclosed)
        lost = [
            (kind, i)
            for mark, kind, i in self._given
            if mark not in text or (kind == "tool calls" and (spoilt or f'\\"{mark}' in text))
        ]
        parts = [i for _, _, i in self._given if i >= 0]
        gone = [i for _, i in lost]
        empty = [i for i in dict.fromkeys(parts) if gone.count(i) == parts.count(i)]
        return Losses(list(dict.fromkeys(kind for kind, _ in lost)), empty)
