"""Held-out rows as questions with one right answer. Beside ``rows``, which knows no tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import tt_data
from tt_data import IGNORE_INDEX
from tt_train.errors import ConfigError, counted


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as token ids, and the text that has to follow; ``tokens`` of it, the one that ends it included."""

    name: str  # of the set that the row is held out in; "" if sets have no names
    ids: tuple[int, ...]
    expected: str
    tokens: int


def questions(dataset: tt_data.Dataset, tokenizer: Any, *, num: int) -> list[Question]:
    """The first ``num`` rows of each named set (of all rows without names) that can be asked.

    Such a row has a prompt before its first trained token, and the answer that begins there is whole: it ends with an
    end token, which is not part of the text. Of a pair it is the chosen answer; a judged answer must be desirable.
    """
    sets = dataset.parts if isinstance(dataset, tt_data.JoinedDataset) else {"": dataset}
    found: list[Question] = []
    for name, rows in sets.items():
        of_set: list[Question] = []
        for row in (row for index in range(len(rows)) for row in _rows(rows, index)):
            if len(of_set) == num:
                break
            if (question := _question(name, row, tokenizer)) is not None:
                of_set.append(question)
        found += of_set
    return found


def question_notes(dataset: tt_data.Dataset, tokenizer: Any, *, num: int) -> list[str]:
    """A line for each set of which fewer than ``num`` rows can be asked. ConfigError if there is a set without any."""
    asked = [question.name for question in questions(dataset, tokenizer, num=num)]
    names = list(dataset.parts) if isinstance(dataset, tt_data.JoinedDataset) else [""]
    notes = []
    why = "an answer needs a prompt before its first trained token, and its end token within data.max_seq_len"
    for name in names if num else ():
        key, count = f"data.eval.{name}" if name else "data.eval", asked.count(name)
        if not count:
            raise ConfigError([f"samples.exact_match: no row of {key} can be asked: {why}; set samples.exact_match=0"])
        if count < num:
            notes.append(
                f"samples.exact_match: {num} asked for, {key} has {counted(count, 'row')} with an answer: {why}"
            )
    return notes


def _rows(dataset: tt_data.Dataset, index: int) -> Iterator[Mapping[str, Any]]:
    """A row, or the rows that were packed in it."""
    if isinstance(dataset, tt_data.Subset | tt_data.PackedDataset | tt_data.MixedDataset):
        for part, row in dataset.members_of(index):
            yield from _rows(part, row)
    else:
        yield dataset[index]


def _question(name: str, row: Mapping[str, Any], tokenizer: Any) -> Question | None:
    side = "" if "input_ids" in row else "chosen_"
    ids, labels = list(row[f"{side}input_ids"]), row[f"{side}labels"]
    first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    answer = ids[first : first + sum(1 for _ in takewhile(lambda label: label != IGNORE_INDEX, labels[first:]))]
    if not first or not row.get("desirable", True) or answer[-1] not in tokenizer.eos_ids:
        return None
    return Question(name=name, ids=tuple(ids[:first]), expected=tokenizer.decode(answer), tokens=len(answer))
