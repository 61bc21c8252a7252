"""Which characters of a conversation's text are trained, for any chat template.

A template may say so itself with ``{% generation %}`` blocks. For any other, a turn starts where the template's
generation prompt for it ends, and it ends after its end-of-turn token. Both places are found by rendering the
conversation up to that turn. A template that writes earlier turns differently once the conversation continues is
compared with itself, on the same conversation with other words in one turn. If that does not show where a turn is, the
conversation is refused instead of masked wrongly.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

from tt_data.template.facts import Facts, Messages, Render, shared_length
from tt_data.template.left_out import REASONING, like, text_of
from tt_data.template.spans import BLANKS, Span

_PROBES = ("0probe", "1probe")
BLOCK_START, BLOCK_END = (secrets.token_hex(12) for _ in range(2))  # in the text, at the edges of a block
BLOCK_EDGES = re.compile(f"{BLOCK_START}|{BLOCK_END}")


class AmbiguousTemplateError(ValueError):
    """The template does not show where a turn begins or ends."""


def generation_spans(
    raw: str, full: str, messages: Messages, trained: Sequence[bool], *, facts: Facts, empty: Sequence[int] = ()
) -> list[Span] | None:
    """The trained spans of ``full``: the blocks that the template marks in ``raw``, each with its end-of-turn token.
    None if there are none, or not one for each assistant turn, or if more than assistant turns are trained."""
    answers = [message["role"] == "assistant" for message in messages]
    if any(wanted and not answer for wanted, answer in zip(trained, answers, strict=True)):
        return None
    flags = [trained[i] and i not in empty for i, answer in enumerate(answers) if answer]
    blocks: list[list[int]] = []
    length = position = 0
    for match in BLOCK_EDGES.finditer(raw):
        length += match.start() - position
        position = match.end()
        if match.group() == BLOCK_START:
            blocks.append([length, length])
        else:
            blocks[-1][1] = length
    if not blocks:
        return None
    if len(flags) != len(blocks):
        if not all(flags):
            return None
        flags = [True] * len(blocks)
    return [_block(full, facts, start, end) for (start, end), wanted in zip(blocks, flags, strict=True) if wanted]


def _block(full: str, facts: Facts, start: int, end: int) -> Span:
    """A block without the header of its turn, which inference writes, and with its end-of-turn token."""
    header = facts.header
    place = full.find(header, max(0, start - len(header)), end) if header else -1
    if 0 <= place <= start:
        start = max(start, place + len(header))
    if any(full.endswith(token, 0, end) or full[:end].rstrip().endswith(token) for token in facts.ends):
        return start, end
    return start, next((end + len(token) for token in facts.ends if full.startswith(token, end)), end)


def turn_spans(
    render: Render, messages: Messages, trained: Sequence[bool], full: str, *, special: re.Pattern[str] | None,
    facts: Facts, empty: Sequence[int] = (),
) -> tuple[list[Span], bool]:  # fmt: skip
    """The trained spans of ``full``, the conversation's text: the turns whose flag is set, except the ``empty``
    answers, of which the template leaves nothing. Also whether all of them follow what inference would ask with.

    ``special`` matches the tokenizer's special tokens. Raises AmbiguousTemplateError.
    """
    finder = _Finder(render, messages, full, special, facts)
    if all(trained):
        cuts = [(0, 0)]
        for i in empty:
            with suppress(AmbiguousTemplateError):  # everything is trained, so a turn that cannot be found stays
                cuts.append(finder.turn(i))
        return [(end, start) for (_, end), (start, _) in pairwise([*cuts, (len(finder.body), 0)])], True
    spans: list[Span] = []
    for i, wanted in enumerate(trained):
        if wanted and i not in empty:
            spans.append(finder.turn(i))
            if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
                raise AmbiguousTemplateError(f"the chat template renders message {i} inside an earlier one")
    return spans, finder.follows_prompts


class _Finder:
    """Positions in one rendered conversation."""

    def __init__(
        self, render: Render, messages: Messages, full: str, special: re.Pattern[str] | None, facts: Facts
    ) -> None:
        self.render, self.messages, self.full, self.special, self.facts = render, messages, full, special, facts
        self.body = full.removesuffix(facts.tail)
        self.follows_prompts = True
        self._rendered = {0: ""}  # the conversation up to a message

    def turn(self, i: int) -> Span:
        """Message ``i``: an answer without its header, anything else with it."""
        if self.messages[i]["role"] != "assistant":
            return self.boundary(i), self.boundary(i + 1)
        start = self.start(i)
        return start, self.end(i, start)

    def boundary(self, i: int) -> int:
        """The place where message ``i`` begins: the length of the text before it."""
        if i == len(self.messages):
            return len(self.body)
        before = self._upto(i)
        if not self.full.startswith(before):
            raise self._ambiguous(i)
        return len(before)

    def _upto(self, i: int) -> str:
        if i not in self._rendered:
            self._rendered[i] = self.render(self.messages[:i], False).removesuffix(self.facts.tail)
        return self._rendered[i]

    def start(self, i: int) -> int:
        """The place where the model's own text begins in turn ``i``: after the generation prompt and any header.

        Blanks at the end of a prompt belong to the model's text: they make one token with the word that follows.
        """
        prompt = self.render(self.messages[:i], True)
        follows = self.full.startswith(prompt)
        self.follows_prompts &= follows
        start = len(prompt) if follows else self._where_answers_differ(i)
        header = self.facts.header
        while header and self.full.startswith(header, start):
            start += len(header)
        return len(self.full[:start].rstrip(BLANKS))

    def _where_answers_differ(self, i: int) -> int:
        """The training text does not contain the generation prompt (DeepSeek-R1 opens a <think> that it later deletes):
        the turn starts at the first difference between two answers."""
        ways: list[Callable[[int, str], Messages]] = [self._with, self._with_call]
        if not text_of(self.messages[i].get("content")).strip():
            ways.reverse()  # a call without words differs in its name; its words may be anywhere, or nowhere
        for other in ways:
            one, two = self._others(i, other)
            place = shared_length(one, two)
            if one != two and self.full.startswith(one[:place]) and place >= (lowest := self._lowest(i)):
                found = self.full.rfind(self.facts.header, lowest, place) if self.facts.header else -1
                if found >= 0:
                    return found + len(self.facts.header)
                return place if other == self._with else min(place, self._behind_last(i))
        before = self._upto(i)
        if self.full.startswith(before):
            return len(before)  # a call that is written without a header
        raise self._ambiguous(i)

    def _behind_last(self, i: int) -> int:
        """The end of the message before turn ``i``, with its closing tokens, in a text that rewrites earlier turns."""
        other = self._with(i - 1, _PROBES[0])
        whole = shared_length(self.render(other, False), self.full)
        short = shared_length(self.render(other[:i], False), self._upto(i))
        return whole + shared_length(self._upto(i)[short:], self.full[whole:])

    def _others(self, i: int, other: Callable[[int, str], Messages]) -> list[str]:
        """The conversation with each of two other turns ``i``; both "" if the template refuses them."""
        try:
            return [self.render(other(i, probe), False) for probe in _PROBES]
        except Exception:  # some take no words beside a call
            return ["", ""]

    def _lowest(self, i: int) -> int:
        """A place before turn ``i`` and behind the words of the turn that it answers."""
        before = self._upto(i)
        if self.full.startswith(before):
            return len(before)
        return shared_length(self.render(self._with(i - 1, _PROBES[0]), False), self.full)

    def end(self, i: int, start: int) -> int:
        """The end of turn ``i``: after its end-of-turn token, without the white space that the template adds."""
        through = self.body if i + 1 == len(self.messages) else self._upto(i + 1)
        if self.full.startswith(through) and len(through) > start:
            return self._after_end_token(start, len(through))
        # The template writes the last turn differently from an earlier one (Qwen3's thinking, Phi-3's final token):
        # compare with the same conversation in which the next turn has other words.
        if i + 1 < len(self.messages):
            other = self.render(self._with(i + 1, _PROBES[0]), False)
            limit = shared_length(other, self.full)
            places = [(self.full.rfind(end, start, limit), end) for end in self.facts.ends]
            position, end = max(places, default=(-1, ""))
            if position > start and any(other.startswith(probe, limit) for probe in (_PROBES[0], _PROBES[0][1:])):
                return position + len(end)
        raise self._ambiguous(i)

    def _after_end_token(self, start: int, stop: int) -> int:
        """``stop``, or the end of the end-of-turn token among the special tokens just before ``stop``.

        A turn without one may end with the token that opens the next turn (GLM's ``<|user|>``).
        """
        if self.special is None:
            return stop
        run: list[re.Match[str]] = []
        position = stop
        for match in reversed(list(self.special.finditer(self.full, start, stop))):
            if self.full[match.end() : position].strip():
                break
            run.insert(0, match)
            position = match.start()
        ends = [match.end() for match in run if match.group() in self.facts.ends]
        if ends:
            return ends[0]
        following = self.special.match(self.full, stop)
        if following and following.group() in self.facts.ends:
            return following.end()
        kept = [match.end() for match in run if match.group() not in self.facts.headers]
        return kept[-1] if kept else run[0].start() if run else stop

    def _with(self, i: int, words: str) -> Messages:
        """The conversation with other words in its turn ``i``, and another thought if it has one."""
        message = {key: words if key in REASONING else value for key, value in self.messages[i].items()}
        message["content"] = like(message.get("content"), words)
        return [*self.messages[:i], message, *self.messages[i + 1 :]]

    def _with_call(self, i: int, name: str) -> Messages:
        """The conversation with calls of a different function in its turn ``i``."""
        message = dict(self.messages[i])
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "name": name}} if "function" in call else {**call, "name": name}
            for call in message.get("tool_calls") or []
        ]
        return [*self.messages[:i], message, *self.messages[i + 1 :]]

    def _ambiguous(self, i: int) -> AmbiguousTemplateError:
        last = len(self.messages) - 1
        return AmbiguousTemplateError(
            f"the chat template renders what comes before message {i} ({self.messages[min(i, last)]['role']}) or the "
            "message itself differently once the conversation continues, so its labels are ambiguous; use "
            f"{'train_on: last, or ' if i < last else ''}a template with {{% generation %}} blocks"
        )
