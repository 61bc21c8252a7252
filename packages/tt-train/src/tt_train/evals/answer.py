"""Answers to prompts, a batch at a time, each up to a text or token that ends it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tt_data
import tt_models
from tt_models.sampling import Sampling
from tt_train.evaluate import end_ids

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How to answer. An answer ends before the first of ``stop``, at an end token, or after ``max_new_tokens``."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


class Answer(NamedTuple):
    """``ended``: at an end token or a text of ``stop``, and not at its length."""

    text: str
    ended: bool


def answer(
    model: tt_models.Decoder,
    tokenizer: tt_data.Tokenizer,
    prompts: Sequence[Sequence[int]],
    wanted: Wanted,
    seeds: Sequence[int] | None,
) -> list[Answer]:
    """The answer to each prompt. ``seeds``: of what each draws, if it does."""
    specials = {*tokenizer.special_tokens}
    named = [tokenizer.token_id(text) for text in wanted.stop if text in specials]
    ends = {*end_ids(model, tokenizer), *(index for index in named if index is not None)}
    stops = [text for text in wanted.stop if text and text not in specials]
    tail = 4 * max(map(len, stops), default=0) + 1  # tokens that hold a stop: each has a byte of it at least
    said: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()

    def stopped(row: int) -> bool:
        near = bool(stops) and _before(tokenizer.decode(said[row][-tail:]), stops)[1]
        if near and _before(tokenizer.decode(said[row]), stops)[1]:
            ended.add(row)
        return row in ended

    for row, token in tt_models.stream_rows(
        model, prompts, max_new_tokens=wanted.max_new_tokens, eos_ids=ends, seed=seeds, stop=stopped,
        **vars(wanted.sampling),
    ):  # fmt: skip
        if token in ends:
            ended.add(row)
        else:
            said[row].append(token)
    texts = [_before(tokenizer.decode(ids), stops)[0] for ids in said]
    return [Answer(text, row in ended) for row, text in enumerate(texts)]


def _before(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """``text`` up to the first of ``stops``, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
