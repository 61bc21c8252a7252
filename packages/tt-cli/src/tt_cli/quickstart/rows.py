"""The rows: questions of several kinds whose answers can be checked, drawn from a seeded generator, and their splits.

The adapter learns a kind that the base never sees; preferences teach it one more. No held-out question is in a training
split.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pa", "ri", "so", "tu", "ve", "wa", "yo", "ze")
CITIES = ("Arlen", "Brisk", "Corda", "Dunmar", "Eltham", "Farrow", "Gilda", "Harrow")
PETS = ("cat", "dog", "owl", "fox", "hen", "crab", "mole", "toad")
JOBS = ("baker", "pilot", "nurse", "miner", "poet", "judge", "tailor", "sailor")
NUM_PEOPLE = 16
TARGET = "sort"  # the kind that the base never sees, and that the adapter learns
PREFERRED = "sort 3 or 7"  # the kind that the adapter fails at, and that preferences teach it: other numbers of letters
KINDS = {"add": 4, "count": 2, "first": 5, "reverse": 8, "lookup": 2}  # the base's kinds: shares of its rows


@dataclass(frozen=True)
class Row:
    """One question with its only right answer; ``kind`` names the task."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Person:
    """An entry of the made-up knowledge base."""

    name: str
    city: str
    pet: str
    job: str


Ask = Callable[[random.Random], Row]

PHRASINGS: dict[str, tuple[str, ...]] = {
    "city": (
        "Where does {} live?", "In which city is {}?", "Name the city of {}.", "The home of {} is where?",
        "Which city does {} live in?", "{} comes from which city?", "Tell me the city of {}.", "{} lives in what city?",
    ),
    "pet": (
        "Which pet has {}?", "What animal lives with {}?", "Name the pet of {}.", "The animal of {} is what?",
        "Which pet does {} live with?", "{} has which pet?", "Tell me the pet of {}.", "{} lives with what animal?",
    ),
    "job": (
        "What does {} do for a living?", "What is the job of {}?", "Name the job of {}.", "The work of {} is what?",
        "Which job does {} have?", "{} has which job?", "Tell me the job of {}.", "{} works as what?",
    ),
}  # fmt: skip


def make_people(rng: random.Random) -> list[Person]:
    """The knowledge base: who lives where, with which pet, doing what."""
    names = [(first + second).capitalize() for first in SYLLABLES for second in SYLLABLES if first != second]
    return [
        Person(name, rng.choice(CITIES), rng.choice(PETS), rng.choice(JOBS)) for name in rng.sample(names, NUM_PEOPLE)
    ]


def add(rng: random.Random) -> Row:
    """A sum of two-digit numbers in which nothing is carried."""
    tens, ones = rng.randint(2, 9), rng.randint(0, 9)
    left_tens, left_ones = rng.randint(1, tens - 1), rng.randint(0, ones)
    left, right = 10 * left_tens + left_ones, 10 * (tens - left_tens) + ones - left_ones
    return Row("add", f"What is {left} + {right}?", str(left + right))


def count(rng: random.Random) -> Row:
    """How many letters there are, from one to nine."""
    letters = rng.sample(LETTERS, rng.randint(1, 9))
    return Row("count", f"How many letters: {' '.join(letters)}", str(len(letters)))


def first(rng: random.Random) -> Row:
    """Which of some letters comes first in the alphabet."""
    letters = rng.sample(LETTERS, rng.randint(3, 6))
    return Row("first", f"First in the alphabet: {' '.join(letters)}", min(letters))


def reverse(rng: random.Random) -> Row:
    """Four to six different letters, backwards."""
    letters = rng.sample(LETTERS, rng.randint(4, 6))
    return Row("reverse", f"Reverse: {' '.join(letters)}", " ".join(reversed(letters)))


def sort(rng: random.Random) -> Row:
    """Four to six different letters, in the order of the alphabet."""
    letters = rng.sample(LETTERS, rng.randint(4, 6))
    return Row("sort", f"Sort: {' '.join(letters)}", " ".join(sorted(letters)))


def sort_3_or_7(rng: random.Random) -> Row:
    """Three or seven different letters, in the order of the alphabet: as many as ``sort`` never has."""
    letters = rng.sample(LETTERS, rng.choice((3, 7)))
    return Row(PREFERRED, f"Sort: {' '.join(letters)}", " ".join(sorted(letters)))


def look_up(people: list[Person]) -> Ask:
    """Questions about the knowledge base, each fact in eight phrasings."""

    def ask(rng: random.Random) -> Row:
        person, fact = rng.choice(people), rng.choice(list(PHRASINGS))
        return Row("lookup", rng.choice(PHRASINGS[fact]).format(person.name), getattr(person, fact))

    return ask


@dataclass(frozen=True, kw_only=True)
class Splits:
    """``pretrain``: the base's kinds. ``finetune``: the target kind. ``held_out``: target rows to be scored on.

    ``base_held_out``: unseen questions of the base's own kinds. ``practice``: questions whose wrong answers become
    preferences. ``practice_held_out``: unseen ones of that kind.
    """

    pretrain: list[Row]
    finetune: list[Row]
    held_out: list[Row]
    base_held_out: list[Row]
    practice: list[Row]
    practice_held_out: list[Row]


def make_splits(
    seed: int,
    *,
    num_pretrain: int,
    num_finetune: int,
    num_held_out: int = 200,
    num_base_held_out: int = 100,
    num_practice: int = 0,
) -> Splits:
    """All rows of one quickstart; no question is there twice, in one split or in two."""
    rng = random.Random(seed)  # noqa: S311  (a data set, not a secret)
    asks = {"add": add, "count": count, "first": first, "reverse": reverse, "lookup": look_up(make_people(rng))}
    used: set[str] = set()
    held_out = _draw(sort, rng, num_held_out, used)
    base_held_out = [
        row for ask in asks.values() for row in _draw(ask, rng, max(1, num_base_held_out // len(asks)), used)
    ]
    total = sum(KINDS.values())
    pretrain = [row for kind, ask in asks.items() for row in _draw(ask, rng, num_pretrain * KINDS[kind] // total, used)]
    rng.shuffle(pretrain)
    finetune = _draw(sort, rng, num_finetune, used)
    return Splits(
        pretrain=pretrain,
        finetune=finetune,
        held_out=held_out,
        base_held_out=base_held_out,
        practice=_draw(sort_3_or_7, rng, num_practice, used),
        practice_held_out=_draw(sort_3_or_7, rng, num_held_out, used),
    )


def _draw(ask: Ask, rng: random.Random, number: int, used: set[str]) -> list[Row]:
    """``number`` rows with questions that are not in ``used``; adds theirs to it."""
    rows: list[Row] = []
    misses = 0
    while len(rows) < number:
        row = ask(rng)
        misses = misses + 1 if row.question in used else 0
        if misses > 10_000:
            raise ValueError(f"{row.kind}: {number} different questions wanted, found only {len(rows)}")
        if not misses:
            rows.append(row)
            used.add(row.question)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write ``rows`` as JSON lines of chat messages, the form that most data sets come in."""
    return _write(path, ({"messages": [_turn("user", row.question), _turn("assistant", row.answer)]} for row in rows))


def write_pairs(path: Path, rows: Iterable[Row], given: Iterable[str]) -> int:
    """Write a preference for each row whose ``given`` answer is wrong: the right one over it. Returns their number.

    An answer without any text cannot be rejected, and is left out. All are chat messages, so that they are trained in
    the chat template, in which the model answers: plain texts would be joined without it.
    """
    pairs = [
        {
            "prompt": [_turn("user", row.question)],
            "chosen": [_turn("assistant", row.answer)],
            "rejected": [_turn("assistant", answer)],
        }
        for row, answer in zip(rows, given, strict=True)
        if answer.strip() and answer != row.answer
    ]
    _write(path, pairs)
    return len(pairs)


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _write(path: Path, lines: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path
