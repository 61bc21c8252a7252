"""Questions whose answers can be checked, of several kinds, drawn from a seeded generator."""

import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pa", "ri", "so", "tu", "ve", "wa", "yo", "ze")
CITIES = ("Arlen", "Brisk", "Corda", "Dunmar", "Eltham", "Farrow", "Gilda", "Harrow")
PETS = ("cat", "dog", "owl", "fox", "hen", "crab", "mole", "toad")
JOBS = ("baker", "pilot", "nurse", "miner", "poet", "judge", "tailor", "sailor")
NUM_PEOPLE = 16


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


def look_up(people: list[Person]) -> Ask:
    """Questions about the knowledge base, each fact in eight phrasings."""

    def ask(rng: random.Random) -> Row:
        person, fact = rng.choice(people), rng.choice(list(PHRASINGS))
        return Row("lookup", rng.choice(PHRASINGS[fact]).format(person.name), getattr(person, fact))

    return ask
