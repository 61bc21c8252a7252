"""The quickstart's rows: answers checked by code that shares nothing with what made them; disjoint, seeded splits."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from tt_cli.quickstart import rows as made
from tt_cli.quickstart.commands import Scale
from tt_cli.quickstart.rows import KINDS, PREFERRED, TARGET, Row, Splits, make_splits, write_pairs, write_rows


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
CHECKS["sort 3 or 7"] = CHECKS["sort"]


def draw(kind: str, seed: int, number: int = 300) -> list[Row]:
    rng = random.Random(seed)
    return [getattr(made, kind.replace(" ", "_"))(rng) for _ in range(number)]


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


def test_preferences_are_about_as_many_letters_as_the_adapter_never_saw():
    letters, other = ({len(set(_letters(row.question))) for row in draw(kind, 3)} for kind in (PREFERRED, TARGET))
    assert letters == {3, 7}
    assert other == {4, 5, 6}


def test_the_knowledge_base_gives_each_fact_one_answer_in_every_phrasing():
    people = made.make_people(random.Random(4))
    known = {person.name: person for person in people}
    assert len(known) == made.NUM_PEOPLE
    ask, rng = made.look_up(people), random.Random(5)
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
    assert phrasings == {fact: set(forms) for fact, forms in made.PHRASINGS.items()}


_VALUES = {"city": made.CITIES, "pet": made.PETS, "job": made.JOBS}


def test_no_phrasing_is_shared_by_two_facts():
    forms = [form for phrasings in made.PHRASINGS.values() for form in phrasings]
    assert len(set(forms)) == len(forms)


SIZES = {"num_pretrain": 1000, "num_finetune": 300, "num_held_out": 50, "num_base_held_out": 25, "num_practice": 40}


def questions(splits: Splits) -> dict[str, list[str]]:
    return {field.name: [row.question for row in getattr(splits, field.name)] for field in fields(splits)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_question_stands_twice_in_one_split_or_in_two(seed: int):
    everything = [question for split in questions(make_splits(seed, **SIZES)).values() for question in split]
    assert len(everything) == len(set(everything))


def test_the_base_never_sees_the_target_kind():
    splits = make_splits(0, **SIZES)
    assert TARGET not in KINDS
    assert not any(row.kind == TARGET or "sort" in row.question.lower() for row in splits.pretrain)
    assert {row.kind for row in (*splits.finetune, *splits.held_out)} == {TARGET}
    assert {row.kind for row in (*splits.practice, *splits.practice_held_out)} == {PREFERRED}


def test_splits_have_the_sizes_and_shares_asked_for():
    splits = make_splits(0, **SIZES)
    assert (len(splits.finetune), len(splits.held_out), len(splits.base_held_out)) == (300, 50, 25)
    assert (len(splits.practice), len(splits.practice_held_out)) == (40, 50)
    assert Counter(row.kind for row in splits.base_held_out) == dict.fromkeys(KINDS, 5)
    total = sum(KINDS.values())
    assert Counter(row.kind for row in splits.pretrain) == {kind: 1000 * part // total for kind, part in KINDS.items()}


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_an_effect(name: str):
    larger = make_splits(0, **{**SIZES, name: SIZES[name] + 20})
    split = name.removeprefix("num_")
    assert len(getattr(larger, split)) > len(getattr(make_splits(0, **SIZES), split))


def test_splits_follow_the_seed():
    assert make_splits(7, **SIZES) == make_splits(7, **SIZES)
    assert make_splits(7, **SIZES) != make_splits(8, **SIZES)


def test_kinds_are_mixed_in_the_file():
    first = make_splits(0, **SIZES).pretrain[:100]
    assert {row.kind for row in first} == set(KINDS)


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"add: \d+ different questions wanted, found only \d+"):
        make_splits(0, **{**SIZES, "num_pretrain": 20_000})


def test_rows_are_written_as_chat_messages(tmp_path: Path):
    path = write_rows(tmp_path / "new" / "rows.jsonl", [Row("sort", "Sort: b a", "a b")])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"messages": [{"role": "user", "content": "Sort: b a"}, {"role": "assistant", "content": "a b"}]}
    ]


@pytest.mark.parametrize("seed", range(5))
def test_there_are_enough_questions_for_the_real_thing(seed: int):
    scale = Scale()
    splits = make_splits(
        seed,
        num_pretrain=scale.pretrain.num_rows,
        num_finetune=scale.finetune.num_rows,
        num_held_out=scale.num_held_out,
        num_practice=scale.preferences.num_rows,
    )
    assert (len(splits.pretrain), len(splits.finetune)) == (scale.pretrain.num_rows, scale.finetune.num_rows)
    assert (len(splits.held_out), len(splits.practice)) == (scale.num_held_out, scale.preferences.num_rows)


def test_only_wrong_answers_with_text_become_pairs(tmp_path: Path):
    rows = [Row("sort", f"Sort: {question}", "a b") for question in ("b a", "a b", "b  a")]
    path = tmp_path / "new" / "pairs.jsonl"
    assert write_pairs(path, [*rows, Row("sort", "Sort: c a", "a c")], ["b a", "a b", " ", "a c d"]) == 2
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": right}],
            "rejected": [{"role": "assistant", "content": wrong}],
        }
        for question, right, wrong in (("Sort: b a", "a b", "b a"), ("Sort: c a", "a c", "a c d"))
    ]
