"""Conversations in the form that a chat template reads, and what of them it does not write.

Content is text or a list of parts, the arguments of a call are text or an object; templates differ in which they take.
What a template loses is found by rendering: every part of the conversation gets a mark, and some do not come out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tt_data.template.left_out import REASONING, Losses, Marks, call_with, like, other_form, part_of, text_of

Messages = list[dict[str, Any]]
Write = Callable[[Messages, Any, Any], str]  # (messages, tools, the template's other variables) -> text

_SHORT = 12  # characters: so few are easily found in a text that does not hold them
_QUESTION, _ANSWER = "zq-question-qz", "zq-answer-qz"


class MessageForms:
    """Knows in which forms one template (``write``) takes content, and tries both for the arguments of calls."""

    def __init__(self, write: Write) -> None:
        self._write = write
        plain = self._writes([_QUESTION, _ANSWER])
        self.takes_parts = self._writes([part_of(_QUESTION), part_of(_ANSWER)])
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
        best = self._best(_candidates(fitted), tools, extra, None)
        if best is None or "tool calls" in best[1].kinds:
            best = self._best(_without_words(fitted, blank=best is None), tools, extra, best)
        return best or (self._first_written(fitted, tools, extra), Losses())

    def _best(
        self, candidates: Iterator[Messages], tools: Any, extra: Any, best: tuple[Messages, Losses] | None
    ) -> tuple[Messages, Losses] | None:
        """The first of ``best`` and the candidates that loses least, None if the template fails on all."""
        for candidate in candidates:
            losses = self._losses(candidate, tools, extra)
            if losses is not None and (best is None or len(losses.kinds) < len(best[1].kinds)):
                best = candidate, losses
            if losses is not None and not losses.kinds:
                break
        return best

    def losses(self, messages: Messages, extra: Any, text: str) -> Losses:
        """What the template does not write of plain turns, of which it made ``text``."""
        words = [text_of(message.get("content")).strip() for message in messages]
        has_system = messages[0]["role"] == "system"
        if self._in_order[has_system] and all(len(word) >= _SHORT for word in words) and _in_order(words, text):
            return Losses()
        return self._losses(messages, None, extra) or Losses()

    def _losses(self, messages: Messages, tools: Any, extra: Any) -> Losses | None:
        """What is not in the rendering of a marked conversation; None if the template fails on it."""
        marks = Marks()
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
        mark = Marks().new("words", i)
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
        mark = Marks().new("reasoning", i)
        marked = {**messages[i], "content": content.replace(closed, mark + closed, 1)}
        try:
            return mark not in self._write([*messages[:i], marked, *messages[i + 1 :]], tools, extra)
        except Exception:
            return False

    def _first_written(self, fitted: Messages, tools: Any, extra: Any) -> Messages:
        """Where marks are in the template's way: the first form that it does not fail on."""
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
    return (
        not is_plain
        or message["role"] == "tool"
        or bool(message.get("tool_calls"))
        or any(message.get(name) for name in REASONING)
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


def _without_words(messages: Messages, *, blank: bool) -> Iterator[Messages]:
    """Calls without content, given "" or null as such; with ``blank`` those of "", too: templates differ in what they
    take."""
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
    """Arguments that are JSON text as the object, and the other way round."""
    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": [call_with(call, other_form) for call in calls]}
