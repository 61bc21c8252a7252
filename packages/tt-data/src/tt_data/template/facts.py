"""How a chat template opens and ends turns: found once, by rendering made-up conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]

_QUESTION, _ANSWER, _OTHER = "zq-question-qz", "zq-answer-qz", "zq-other-qz"
_ASK = {"role": "user", "content": _QUESTION}
_TELL = {"role": "assistant", "content": _ANSWER}
_ASK_MORE = {"role": "user", "content": _OTHER}
_FIRST_LINE = re.compile(r"[^\n]*\n*")


@dataclass(frozen=True)
class Facts:
    """``ends``: the special tokens that end an assistant turn. ``headers``: those that open one and never end one.
    ``header``: the text that opens an answer. ``tail``: the text that follows every conversation although no
    generation prompt was asked for. ``keeps_its_prompt``: whether training and inference begin with the same text."""

    ends: tuple[str, ...]
    headers: frozenset[str]
    header: str
    tail: str
    keeps_its_prompt: bool


def study(render: Render, special: re.Pattern[str] | None, named_ends: Sequence[str]) -> Facts:
    """The facts of a template. ``special`` finds special tokens; ``named_ends`` end turns by the tokenizer's files."""
    asked, unasked = _try(render, [_ASK], True), _try(render, [_ASK], False)
    answered, longer = _try(render, [_ASK, _TELL], False), _try(render, [_ASK, _TELL, _ASK_MORE], False)
    keeps = not asked or not answered or answered.startswith(asked)
    if special is None or _ANSWER not in answered:
        return Facts(tuple(named_ends), frozenset(), "", "", keeps)
    behind = answered.partition(_ANSWER)[2]
    between = longer.partition(_ANSWER)[2].partition(_OTHER)[0]
    prompt = asked[len(unasked) :] if asked.startswith(unasked) else asked[shared_length(asked, unasked) :]
    before = answered.partition(_QUESTION)[0]
    headers = _headers(special, prompt, before, between, behind) - set(named_ends)
    ends = _ends(special, headers, behind, between)
    tail = "" if prompt else _from_header(special, headers, behind)
    header = prompt
    if (
        not prompt and not tail and answered.startswith(unasked)
    ):  # no generation prompt: the header comes with the answer
        header = _from_header(special, headers, answered[len(unasked) : answered.index(_ANSWER)])
    has_ends = bool(_run(special, headers, behind))
    ends += [end for end in _call_ends(render, special, headers, has_ends=has_ends) if end not in ends]
    ends += [end for end in named_ends if end not in ends]
    return Facts(tuple(ends), frozenset(headers), _first_line(header), tail, keeps)


def shared_length(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _try(render: Render, conversation: Messages, prompt: bool) -> str:
    """The text; "" if the template refuses it: some refuse a conversation that ends with the user, or calls."""
    try:
        return render(conversation, prompt)
    except Exception:
        return ""


def _headers(special: re.Pattern[str], prompt: str, before: str, between: str, behind: str) -> set[str]:
    """The special tokens that open turns: those of the generation prompt; without one, those with which the first
    question and the second open alike."""
    if prompt:
        return set(special.findall(prompt))
    alike = shared_length(before[::-1], between[::-1])
    if alike < len(between):
        return set(special.findall(between[len(between) - alike :]))
    same = behind[: shared_length(behind, between)]  # up to the name of the role
    return set() if same == behind else set(special.findall(same)[-1:])


def _ends(special: re.Pattern[str], headers: set[str], behind: str, between: str) -> list[str]:
    """The last of the special tokens that directly follow an answer; and that of an answer that something follows."""
    last, middle = _run(special, headers, behind), _run(special, headers, between)
    found = last[-1:]
    if middle and not set(found) & set(middle):
        found.append(middle[0])
    return found


def _run(special: re.Pattern[str], headers: set[str], text: str) -> list[str]:
    """The first special token in ``text`` with those that follow it directly, up to a header."""
    found: list[str] = []
    position = None
    for match in special.finditer(text):
        if match.group() in headers or position not in (None, match.start()):
            break
        found.append(match.group())
        position = match.end()
    return found


def _call_ends(render: Render, special: re.Pattern[str], headers: set[str], *, has_ends: bool) -> list[str]:
    """The special token that ends a turn with calls, if it differs from that of words: the last one behind two calls.

    If no token ends the template's turns (``has_ends`` is false): the role token that follows a call.
    """
    calls = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "f", "arguments": {"q": _ANSWER}}} for i in "12"
    ]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "content": _OTHER, "tool_call_id": "abcdefgh1", "name": "f"}
    text = _try(render, [_ASK, call], False) or _try(render, [_ASK, {**call, "tool_calls": calls[:1]}], False)
    if _ANSWER not in text:
        return []
    behind_first = special.findall(text.partition(_ANSWER)[2])
    ends = [token for token in behind_first[-1:] if behind_first.count(token) == 1 and token not in headers]
    after = _try(render, [_ASK, call, result], False)
    if not has_ends and after.startswith(text):
        match = special.match(after, len(text))
        ends += [match.group()] if match and match.group() not in headers else []
    return ends


def _from_header(special: re.Pattern[str], headers: set[str], text: str) -> str:
    """``text`` from its first header on, "" without one."""
    start = next((m.start() for m in special.finditer(text) if m.group() in headers), len(text))
    return text[start:]


def _first_line(header: str) -> str:
    """Without what a template writes for the model after its header, such as an opened thought."""
    match = _FIRST_LINE.match(header)
    return match.group().partition("<think>")[0] if match else ""
