"""Rows of the base's tasks, rows of the task to learn, and held-out rows of both that no training split contains."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tt_cli.quickstart import tasks
from tt_cli.quickstart.tasks import Ask, Row

TARGET = "sort"  # the kind that the base never sees, and that the adapter learns
KINDS = {"add": 4, "count": 2, "first": 5, "reverse": 8, "lookup": 2}  # the base's kinds: shares of its rows


@dataclass(frozen=True, kw_only=True)
class Splits:
    """``pretrain``: the base's kinds. ``finetune``: the target kind. ``held_out``: target rows to be scored on.

    ``base_held_out``: unseen questions of the base's own kinds.
    """

    pretrain: list[Row]
    finetune: list[Row]
    held_out: list[Row]
    base_held_out: list[Row]


def make_splits(
    seed: int, *, num_pretrain: int, num_finetune: int, num_held_out: int = 200, num_base_held_out: int = 100
) -> Splits:
    """All rows of one quickstart; no question is there twice, in one split or in two."""
    rng = random.Random(seed)  # noqa: S311  (a data set, not a secret)
    asks = {kind: getattr(tasks, kind) for kind in KINDS if kind != "lookup"}
    asks["lookup"] = tasks.look_up(tasks.make_people(rng))
    used: set[str] = set()
    held_out = _draw(tasks.sort, rng, num_held_out, used)
    base_held_out = [
        row for ask in asks.values() for row in _draw(ask, rng, max(1, num_base_held_out // len(asks)), used)
    ]
    total = sum(KINDS.values())
    pretrain = [row for kind, ask in asks.items() for row in _draw(ask, rng, num_pretrain * KINDS[kind] // total, used)]
    rng.shuffle(pretrain)
    finetune = _draw(tasks.sort, rng, num_finetune, used)
    return Splits(pretrain=pretrain, finetune=finetune, held_out=held_out, base_held_out=base_held_out)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            turns = (("user", row.question), ("assistant", row.answer))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return path
