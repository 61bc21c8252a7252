"""The answers of the quickstart's questions, checked by code that shares nothing with what made them."""

import random
import re
from collections.abc import Callable

import pytest

from tt_cli.quickstart import tasks
from tt_cli.quickstart.tasks import Row


def _sum(question: str) -> str:
    left, right = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", question).groups())  # type: ignore[union-attr]
    return str(left + right)


def _letters(question: str) -> list[str]:
    return re.findall(r"\b[a-z]\b", question.split(":")[1])


CHECKS: dict[str, Callable[[str], str]] = {
    "add": _sum,
    "count": lambda question: str(sum(c.isalpha() for c in question.split(":")[1])),
    "first": lambda question: sorted(_letters(question), key=ord)[0],
    "reverse": lambda question: question.split(": ")[1][::-1],
    "sort": lambda question: " ".join(c for c in map(chr, range(97, 123)) if c in _letters(question)),
}


def draw(kind: str, seed: int, number: int = 300) -> list[Row]:
    rng = random.Random(seed)
    return [getattr(tasks, kind)(rng) for _ in range(number)]


@pytest.mark.parametrize("kind", CHECKS)
def test_every_answer_is_right(kind: str):
    for row in draw(kind, 1):
        assert row.kind == kind
        assert row.answer == CHECKS[kind](row.question), row


@pytest.mark.parametrize("kind", CHECKS)
def test_questions_follow_the_seed(kind: str):
    assert draw(kind, 1) == draw(kind, 1)
    assert draw(kind, 1) != draw(kind, 2)


def test_sums_carry_nothing_and_have_two_digits():
    for row in draw("add", 2):
        left, right = re.findall(r"\d+", row.question)
        assert len(left) == len(right) == len(row.answer) == 2
        assert all(int(a) + int(b) == int(c) for a, b, c in zip(left, right, row.answer, strict=True))


def test_letters_to_order_are_different_and_rarely_in_order_already():
    rows = draw("sort", 3)
    assert all(len(set(_letters(row.question))) == len(_letters(row.question)) >= 4 for row in rows)
    assert sum(row.question.endswith(row.answer) for row in rows) < 0.05 * len(rows)


def test_the_knowledge_base_gives_each_fact_one_answer_in_every_phrasing():
    people = tasks.make_people(random.Random(4))
    known = {person.name: person for person in people}
    assert len(known) == tasks.NUM_PEOPLE
    ask, rng = tasks.look_up(people), random.Random(5)
    answers: dict[tuple[str, str], set[str]] = {}
    phrasings: dict[str, set[str]] = {}
    for _ in range(5000):
        row = ask(rng)
        name = next(word for word in re.findall(r"\w+", row.question) if word in known)
        fact = next(f for f, values in _VALUES.items() if row.answer in values)
        answers.setdefault((name, fact), set()).add(row.answer)
        phrasings.setdefault(fact, set()).add(row.question.replace(name, "{}"))
    assert set(answers) == {(name, fact) for name in known for fact in _VALUES}
    assert all(found == {getattr(known[name], fact)} for (name, fact), found in answers.items())
    assert phrasings == {fact: set(forms) for fact, forms in tasks.PHRASINGS.items()}


_VALUES = {"city": tasks.CITIES, "pet": tasks.PETS, "job": tasks.JOBS}


def test_no_phrasing_is_shared_by_two_facts():
    forms = [form for phrasings in tasks.PHRASINGS.values() for form in phrasings]
    assert len(set(forms)) == len(forms)
