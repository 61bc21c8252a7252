"""The prompt of one row with the answer of another: KTO measures its divergence on these, https://arxiv.org/abs/2402.01306.

A file apart: data sets and streams both draw from it, and nothing else in them needs to know how.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from tt_data.template.spans import Encoded, Span, cut
from tt_data.token_rows.order import hash_of

_TRIES = 16  # rows that are drawn until one differs in its prompt and in its answer


def mismatched(
    own: Encoded, get: Callable[[int], Encoded], size: int, *, key: tuple[int, ...], max_seq_len: int | None
) -> Encoded:
    """``own`` with the answer of one of the other rows ``get(range(size))``, cut at ``max_seq_len``; ``key`` draws it.

    The first row drawn that has a different prompt and a different answer is taken, else one with a different answer.
    It is ``own`` again only if no row says anything else.
    """
    prompt, answer, _ = _split(own)
    taken, most = own, 0
    drawn = (hash_of(*key, attempt) % size for attempt in range(_TRIES))
    for tried, place in enumerate(chain(drawn, range(size))):
        if most == 3 or (tried >= _TRIES and most):
            break
        other = get(place)
        other_prompt, other_answer, _ = _split(other)
        differs = 2 * (other_answer != answer) + (other_prompt != prompt)
        if differs > most:
            taken, most = other, differs
    _, ids, trained = _split(taken)
    return cut(Encoded(prompt + ids, [(a + len(prompt), b + len(prompt)) for a, b in trained]), max_seq_len)


def _split(row: Encoded) -> tuple[list[int], list[int], list[Span]]:
    """The prompt, and the answer with the spans of it that are trained."""
    start = row.trained[0][0]
    return row.ids[:start], row.ids[start:], [(a - start, b - start) for a, b in row.trained]
