"""Splits of the quickstart: disjoint, without repeats, and a function of the seed."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from tt_cli.quickstart.scale import Scale
from tt_cli.quickstart.splits import KINDS, TARGET, Splits, make_splits, write_rows
from tt_cli.quickstart.tasks import Row

SIZES = {"num_pretrain": 1000, "num_finetune": 300, "num_held_out": 50, "num_base_held_out": 25}


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


def test_splits_have_the_sizes_and_shares_asked_for():
    splits = make_splits(0, **SIZES)
    assert (len(splits.finetune), len(splits.held_out), len(splits.base_held_out)) == (300, 50, 25)
    assert Counter(row.kind for row in splits.base_held_out) == dict.fromkeys(KINDS, 5)
    total = sum(KINDS.values())
    assert Counter(row.kind for row in splits.pretrain) == {kind: 1000 * part // total for kind, part in KINDS.items()}


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_an_effect(name: str):
    larger = make_splits(0, **{**SIZES, name: SIZES[name] + 20})
    split = {"num_pretrain": "pretrain", "num_finetune": "finetune", "num_held_out": "held_out"}.get(
        name, "base_held_out"
    )
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
    splits = make_splits(seed, num_pretrain=scale.pretrain.num_rows, num_finetune=scale.finetune.num_rows)
    assert (len(splits.pretrain), len(splits.finetune)) == (scale.pretrain.num_rows, scale.finetune.num_rows)
