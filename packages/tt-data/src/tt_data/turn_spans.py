"""Which characters of a rendered conversation are trained, for any chat template.

A turn starts where the template's generation prompt for it ends, and it ends after its end-of-turn token. Both places
are found by rendering the conversation up to that turn, and every such rendering must be a prefix of the whole one;
a template that rewrites earlier turns so that this fails is refused instead of masked wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
Span = tuple[int, int]

_PROBES = ("0probe", "1probe")
_WORDS = ("content", "reasoning_content", "thinking", "reasoning")


class AmbiguousTemplateError(ValueError):
    """The template does not show where a turn begins or ends."""


def find_turn_ends(render: Render, control: re.Pattern[str] | None) -> list[str]:
    """The control strings with which this template ends an assistant turn, found by rendering a made-up one."""
    if control is None:
        return []
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "zq-answer-qz"}
    last = _controls_behind(render, [question, answer], control)
    found = last[-1:]
    middle = _controls_behind(render, [question, answer, question], control)
    if middle and not set(found) & set(middle):
        found.append(middle[0])
    return found


def keeps_its_prompt(render: Render) -> bool:
    """Whether an answered conversation begins like the prompt for that answer: what is trained is what is asked for."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "zq-answer-qz"}
    try:
        return render([question, answer], False).startswith(render([question], True))
    except Exception:  # a template may ask for more than a question
        return True


def _controls_behind(render: Render, conversation: Messages, control: re.Pattern[str]) -> list[str]:
    """The first control string behind the made-up answer, with those that follow it directly."""
    try:
        text = render(conversation, False)
    except Exception:  # a template may refuse a conversation that ends with the user
        return []
    found: list[str] = []
    position = None
    for match in control.finditer(text, text.find("zq-answer-qz")) if "zq-answer-qz" in text else ():
        if position is not None and match.start() != position:
            break
        found.append(match.group())
        position = match.end()
    return found


def turn_spans(
    render: Render, messages: Messages, trained: Sequence[bool], *, control: re.Pattern[str] | None, ends: Sequence[str]
) -> tuple[str, list[Span]]:
    """The conversation's text and its trained spans: the turns whose flag is set.

    ``control`` matches the tokenizer's control strings, ``ends`` end a turn. Raises AmbiguousTemplateError.
    """
    full = render(messages, False)
    if all(trained):
        return full, [(0, len(full))]
    finder = _Finder(render, messages, full, control, ends)
    spans: list[Span] = []
    for i, (message, wanted) in enumerate(zip(messages, trained, strict=True)):
        if wanted:
            start = finder.start(i) if message["role"] == "assistant" else finder.boundary(i)
            end = finder.end(i, start) if message["role"] == "assistant" else finder.boundary(i + 1)
            if spans and start < spans[-1][1]:
                raise AmbiguousTemplateError(f"the chat template renders message {i} inside an earlier one")
            spans.append((start, end))
    return full, spans


def _shared_length(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


class _Finder:
    """Positions in one rendered conversation."""

    def __init__(
        self, render: Render, messages: Messages, full: str, control: re.Pattern[str] | None, ends: Sequence[str]
    ) -> None:
        self.render, self.messages, self.full, self.control, self.ends = render, messages, full, control, ends

    def boundary(self, i: int) -> int:
        """Where message ``i`` begins: the length of what comes before it."""
        before = self.render(self.messages[:i], False) if i else ""
        if not self.full.startswith(before):
            raise self._ambiguous(i)
        return len(before)

    def start(self, i: int) -> int:
        """Where the model's own text begins in turn ``i``: after the generation prompt."""
        prompt = self.render(self.messages[:i], True)
        if self.full.startswith(prompt):
            return len(prompt)
        # The generation prompt is not what training text holds there (DeepSeek-R1 opens a <think> that it later
        # deletes): the turn starts where two different answers begin to differ.
        before = self.boundary(i)
        others = [self.render(self._with(i, probe), False) for probe in _PROBES]
        start = _shared_length(*others)
        if others[0] == others[1] or start < before or not self.full.startswith(others[0][:start]):
            raise self._ambiguous(i)
        return start

    def end(self, i: int, start: int) -> int:
        """Where turn ``i`` ends: after its end-of-turn token, without the template's white space behind it."""
        last = i + 1 == len(self.messages)
        through = self.full if last else self.render(self.messages[: i + 1], False)
        if self.full.startswith(through) and len(through) > start:
            return self._after_end_token(start, len(through))
        # The last turn is rendered otherwise than an earlier one (Qwen3's thinking, Phi-3's final token): compare
        # with the same conversation that goes on differently.
        if not last:
            other = self.render([*self.messages[: i + 1], {**self.messages[i + 1], "content": _PROBES[0]}], False)
            limit = _shared_length(other, self.full)
            found = [self.full.find(end, start, limit) for end in self.ends]
            position, end = min(((p, e) for p, e in zip(found, self.ends, strict=True) if p >= 0), default=(-1, ""))
            if position >= 0:
                return position + len(end)
        raise self._ambiguous(i)

    def _after_end_token(self, start: int, stop: int) -> int:
        """``stop``, or the end of the first end-of-turn token in the run of control tokens just before ``stop``."""
        if self.control is None:
            return stop
        run: list[re.Match[str]] = []
        position = stop
        for match in reversed(list(self.control.finditer(self.full, start, stop))):
            if self.full[match.end() : position].strip():
                break
            run.insert(0, match)
            position = match.start()
        if not run:
            return stop
        return next((match.end() for match in run if match.group() in self.ends), run[-1].end())

    def _with(self, i: int, content: str) -> Messages:
        """The conversation with another answer as its turn ``i``: its words and its reasoning, where it has any."""
        message = {key: content if key in _WORDS else value for key, value in self.messages[i].items()}
        return [*self.messages[:i], message, *self.messages[i + 1 :]]

    def _ambiguous(self, i: int) -> AmbiguousTemplateError:
        last = len(self.messages) - 1
        return AmbiguousTemplateError(
            f"the chat template renders what comes before message {i} ({self.messages[min(i, last)]['role']}) or the "
            "message itself differently once the conversation goes on, so its labels are ambiguous; use "
            f"{'train_on: last, or ' if i < last else ''}a template with {{% generation %}} blocks"
        )
