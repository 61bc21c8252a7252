"""Conversations in the form that a chat template reads.

Content is text or a list of parts, the arguments of a call are text or an object; templates differ in which they take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tt_data.template.left_out import (
    REASONING,
    SHORT,
    Losses,
    Messages,
    Write,
    call_with,
    left_out,
    other_form,
    part_of,
    text_of,
)

_QUESTION, _ANSWER = "zq-question-qz", "zq-answer-qz"


class MessageForms:
    """The forms of content that one template (``write``) takes. Arguments of calls are tried in both forms."""

    def __init__(self, write: Write) -> None:
        self._write = write
        plain = self._writes([_QUESTION, _ANSWER])
        self.takes_parts = self._writes([part_of(_QUESTION), part_of(_ANSWER)])
        self.wants_parts = self.takes_parts and not plain
        self._in_order = {has_system: self._keeps_order(has_system) for has_system in (False, True)}

    def _writes(self, contents: list[Any]) -> bool:
        try:
            text = self._write(_turns(contents), None, None)
        except Exception:  # it refuses this form, or any conversation: its rows will show
            return False
        printed = any(f"{quote}{word}{quote}" in text for quote in "'\"" for word in (_QUESTION, _ANSWER))
        return _QUESTION in text and _ANSWER in text and not printed  # not as Python or JSON spells a list

    def _keeps_order(self, has_system: bool) -> bool:
        """Whether every turn is written, in order. Then it is enough to look for the words of a row in its text."""
        words = [f"{_QUESTION}{i}" for i in range(5)]
        turns = [{"role": "system", "content": words[4]}] * has_system + _turns(words[:4])
        words = words[4:] * has_system + words[:4]
        try:
            return _in_order(words, self._write([self._fit_content(turn) for turn in turns], None, None))
        except Exception:
            return False

    def fit(self, messages: Messages, tools: Any, extra: Any) -> tuple[Messages, Losses | None]:
        """``messages`` as this template takes them, and what it leaves out; None if its text will show it (``losses``).

        The template gets them as they are, or in another form if it fails on them or leaves something out.
        """
        fitted = [self._fit_content(message) for message in messages]
        if not tools and not any(map(_has_more, fitted)):
            return fitted, None
        best = self._best(_candidates(fitted), tools, extra, None)
        if best is None or "tool calls" in best[1].kinds:
            best = self._best(_without_words(fitted, blank=best is None), tools, extra, best)
        return best or (self._first_written(fitted, tools, extra), Losses())

    def _best(
        self, candidates: Iterator[Messages], tools: Any, extra: Any, best: tuple[Messages, Losses] | None
    ) -> tuple[Messages, Losses] | None:
        """Of ``best`` and the candidates, the first of which least is left out; None if the template fails on all."""
        for candidate in candidates:
            losses = left_out(self._write, candidate, tools, extra)
            if losses is not None and (best is None or len(losses.kinds) < len(best[1].kinds)):
                best = candidate, losses
            if losses is not None and not losses.kinds:
                break
        return best

    def losses(self, messages: Messages, extra: Any, text: str) -> Losses:
        """What the template leaves out of plain turns, whose text is ``text``."""
        words = [text_of(message.get("content")).strip() for message in messages]
        has_system = messages[0]["role"] == "system"
        if self._in_order[has_system] and all(len(word) >= SHORT for word in words) and _in_order(words, text):
            return Losses()
        return left_out(self._write, messages, None, extra) or Losses()

    def _first_written(self, fitted: Messages, tools: Any, extra: Any) -> Messages:
        """If the template fails on marks: the first form that it takes without them."""
        for candidate in (*_candidates(fitted), *_without_words(fitted, blank=True)):
            with contextlib.suppress(Exception):
                self._write(candidate, tools, extra)
                return candidate
        return fitted

    def _fit_content(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str) and self.wants_parts:
            return {**message, "content": part_of(content)}
        if isinstance(content, list) and not self.takes_parts:
            return {**message, "content": text_of(content)}
        return message


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
    if is_plain and len(message) == 2:  # its role and its words
        return bool(message["role"] == "tool")
    return (
        not is_plain
        or message["role"] == "tool"
        or bool(message.get("tool_calls"))
        or any(message.get(name) for name in REASONING)
    )


def _candidates(messages: Messages) -> Iterator[Messages]:
    """Unchanged; then with joined parts, with the arguments of calls in their other form, and with both."""
    joined = [_joined(message) for message in messages]
    called = [_with_other_arguments(message) for message in messages]
    yield messages
    if joined != messages:
        yield joined
    if called != messages:
        yield called
        if joined != messages:
            yield [_with_other_arguments(message) for message in joined]


def _without_words(messages: Messages, *, blank: bool) -> Iterator[Messages]:
    """Calls without content, with "" or null as content; with ``blank`` also calls whose content is "". Templates
    differ in what they take."""
    spare = [
        i for i, message in enumerate(messages)
        if message.get("tool_calls") and ("content" not in message or (blank and not message["content"]))
    ]  # fmt: skip
    forms: tuple[dict[str, Any], ...] = ({"content": ""}, {"content": None}, {})
    for form in forms if spare else ():
        changed = [
            {**{key: value for key, value in message.items() if key != "content"}, **form} if i in spare else message
            for i, message in enumerate(messages)
        ]
        yield from _candidates(changed) if changed != messages else ()


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return (
        {**message, "content": part_of(text_of(content))} if isinstance(content, list) and len(content) > 1 else message
    )


def _with_other_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are JSON text as an object, and objects as text."""
    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": [call_with(call, other_form) for call in calls]}
