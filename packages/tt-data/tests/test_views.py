"""Views: what each indexed method says of a row is what it says of the rows that this row is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tt_data import JoinedDataset, Subset, batches, load_dataset, show
from tt_data.token_rows.dataset import Dataset
from tt_data.token_rows.views import View

INDEXED = ("rendered", "documents", "document_names", "where", "length", "is_truncated", "__getitem__")


@pytest.fixture
def views(chatml: Any, write_jsonl: Any, make_chat_rows: Any) -> dict[str, View]:
    """One of each kind, and views of views; every row differs from those around it in every answer."""
    pairs = [{"prompt": "a ", "chosen": f"{'the cat ' * i}b", "rejected": f"c{i}"} for i in range(1, 9)]
    rows = [write_jsonl(make_chat_rows(20)[i::2], f"{name}.jsonl") for i, name in enumerate("ab")]
    whole = load_dataset(rows[0], chatml, max_seq_len=24)
    mix = load_dataset(dict.fromkeys(rows, 0.5), chatml, max_seq_len=24)
    packed = load_dataset(rows, chatml, max_seq_len=64, packing=True)
    packs = load_dataset(dict.fromkeys(rows, 0.5), chatml, max_seq_len=64, packing=True)
    return {
        "subset": Subset(whole, [7, 2, 5]),
        "subset of pairs": Subset(load_dataset(pairs, chatml), [3, 0]),
        "mix": mix,
        "subset of a mix": Subset(mix, [5, 4, 1]),
        "packs": packed,
        "subset of packs": Subset(packed, [2, 0]),
        "mix of packs": packs,
        "subset of a mix of packs": Subset(packs, [1, 0]),
        "joined": JoinedDataset({"one": Subset(whole, [7, 2]), "two": mix}),
        "joined packs": JoinedDataset({"one": packed, "two": packs}),
    }


def joined(name: str, answers: list[Any]) -> Any:
    """The answers for the members of a row as the one for the row."""
    if name in ("rendered", "documents", "document_names"):
        return [item for answer in answers for item in answer]
    how: dict[str, Callable[[list[Any]], Any]] = {"where": ", ".join, "length": sum, "is_truncated": any}
    return how[name](answers) if name in how else answers[0]


def members(view: Dataset, i: int) -> list[tuple[Dataset, int]]:
    """The rows that no view made, of which a row is made."""
    if not isinstance(view, View):
        return [(view, i)]
    return [found for part, row in view.members_of(i) for found in members(part, row)]


@pytest.mark.parametrize("name", INDEXED)
def test_every_answer_about_a_row_of_a_view_is_about_its_own_rows(views: dict[str, View], name: str) -> None:
    for kind, view in views.items():
        for i in range(len(view)):
            rows = members(view, i)
            if name == "__getitem__" and "packs" in kind:
                ids = [token for part, row in rows for token in part[row]["input_ids"]]
                assert view[i]["input_ids"] == ids, kind
                continue
            found = getattr(view, name)(i)
            assert found == joined(name, [getattr(part, name)(row) for part, row in rows]), (kind, i)
            assert found == getattr(view, name)(i - len(view)), (kind, "from the end")


def test_a_held_out_row_is_shown_with_its_own_text_and_place(chatml: Any) -> None:
    rows = [{"prompt": f"question {i} ", "completion": "the cat " * i} for i in range(1, 9)]
    whole = load_dataset(rows, chatml)
    held_out = Subset(load_dataset(rows, chatml, max_seq_len=whole.length(6) - 1), [6, 1])
    for sample, i in zip(show(held_out), (6, 1), strict=True):
        text = "".join(text for text, _ in sample["documents"][0])
        assert text.startswith(f"question {i + 1} ")
        assert sample["where"] == f"rows:{i}" == sample["names"][0]
        assert sample["tokens"] == held_out.length(sample["index"])
        assert sample["truncated"] == (i == 6)


@pytest.mark.parametrize("name", INDEXED)
def test_a_row_outside_of_a_view_is_an_index_error(views: dict[str, View], name: str) -> None:
    for view in views.values():
        for i in (len(view), -len(view) - 1):
            with pytest.raises(IndexError, match=f"row {i} of {len(view)}"):
                getattr(view, name)(i)


def test_a_subset_of_a_mix_never_meets_the_rows_that_it_leaves_out(views: dict[str, View]) -> None:
    subset = views["subset of a mix"]
    rows = [subset[i]["input_ids"] for i in range(len(subset))]
    for epoch in range(3):
        assert [subset.at(i, epoch)["input_ids"] for i in range(len(subset))] == rows
        assert [subset.where(i, epoch) for i in range(len(subset))] == [subset.where(i) for i in range(len(subset))]
    stream = batches(subset, batch_size=1, shuffle=False)
    assert [next(stream)["input_ids"][0].tolist() for _ in range(6)] == rows * 2


def test_a_view_counts_the_rows_of_the_source_in_its_packs(views: dict[str, View]) -> None:
    packed = views["packs"]
    assert packed.num_rows == 20 > len(packed)
    assert views["subset of packs"].num_rows == len(members(packed, 2)) + len(members(packed, 0))
    assert views["subset"].num_rows == 3
    assert views["mix of packs"].num_rows == len(views["mix of packs"])


def test_joined_rows_come_one_set_after_the_other_and_their_reports_add_up(chatml: Any, make_chat_rows: Any) -> None:
    rows = make_chat_rows(9)
    one, two = load_dataset(rows[:3], chatml), load_dataset([*rows[3:], {"messages": []}], chatml)
    both = JoinedDataset({"one": one, "two": two})
    assert [both[i] for i in range(len(both))] == [*(one[i] for i in range(3)), *(two[i] for i in range(6))]
    assert both[-1] == two[5]
    with pytest.raises(IndexError):
        both[9]
    assert (both.num_rows, both.report["rows"], sum(both.report["dropped"].values())) == (9, 9, 1)
    pairs = load_dataset([{"prompt": "a ", "chosen": "b", "rejected": "c"}], chatml)
    with pytest.raises(ValueError, match="pairs: preference rows cannot be evaluated together with openai rows"):
        JoinedDataset({"one": one, "pairs": pairs})
