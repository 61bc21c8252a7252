"""Packs hold whole documents, each once, and a model reads them as it reads them alone."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tt_data import IGNORE_INDEX, collate, load_dataset, pack


@pytest.mark.parametrize("seed", range(5))
def test_every_document_once_and_no_pack_too_long(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 64) for _ in range(500)]
    packs = pack(lengths, 64, seed=seed)
    assert sorted(d for members in packs for d in members) == list(range(500))
    assert all(sum(lengths[d] for d in members) <= 64 for members in packs)
    assert packs == pack(lengths, 64, seed=seed)
    assert packs != pack(lengths, 64, seed=seed + 1)


def naive_best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Longest first, into the fullest pack that has room: the definition, in quadratic time. Lengths of each pack.

    Packs that are equally full may be chosen either way, so only how full they all become is defined.
    """
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [p for p in packs if sum(p) + length <= size]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


@pytest.mark.parametrize("seed", range(10))
def test_packs_are_those_of_best_fit(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(200)]
    ours = [[lengths[d] for d in members] for members in pack(lengths, 40)]
    assert Counter(map(sum, ours)) == Counter(map(sum, naive_best_fit(lengths, 40)))


def test_short_documents_fill_their_packs() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(2000)]
    assert sum(lengths) / (len(pack(lengths, 256)) * 256) > 0.99


def test_edges_of_packing() -> None:
    assert pack([], 8) == []
    assert pack([8], 8) == [[0]]
    assert pack([8, 8], 8) in ([[0], [1]], [[1], [0]])
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit into packs of 8"):
        pack([3, 9], 8)


@pytest.fixture(scope="module")
def datasets(chatml: Any, make_chat_rows: Any) -> tuple[Any, Any]:
    rows = make_chat_rows(60) + make_chat_rows(20, turns=3)
    return load_dataset(rows, chatml), load_dataset(rows, chatml, max_seq_len=128, packing=True)


def split_documents(row: dict[str, list[int]], side: str = "") -> list[tuple[list[int], list[int]]]:
    """The documents of a pack, by its position_ids alone."""
    starts = [i for i, p in enumerate(row[f"{side}position_ids"]) if p == 0]
    ends = [*starts[1:], len(row[f"{side}position_ids"])]
    return [(row[f"{side}input_ids"][a:b], row[f"{side}labels"][a:b]) for a, b in zip(starts, ends, strict=True)]


def test_every_token_of_every_document_exactly_once(datasets: tuple[Any, Any]) -> None:
    alone, packed = datasets
    found = [document for i in range(len(packed)) for document in split_documents(packed[i])]
    assert all(labels[0] == IGNORE_INDEX for _, labels in found)
    wanted = [(alone[i]["input_ids"], [IGNORE_INDEX, *alone[i]["labels"][1:]]) for i in range(len(alone))]
    assert sorted(found) == sorted(wanted)
    assert all(len(packed[i]["input_ids"]) == packed.length(i) <= 128 for i in range(len(packed)))
    total = sum(len(ids) for ids, _ in wanted)
    assert packed.report["packs"] == len(packed)
    assert packed.report["efficiency"] == round(total / (len(packed) * 128), 4)
    assert packed.report["rows"] == len(alone)


def test_packs_of_text_do_not_train_the_first_token_of_a_document(llama: Any) -> None:
    packed = load_dataset([{"text": f"the cat {i}"} for i in range(9)], llama, max_seq_len=64, packing=True)
    for ids, labels in split_documents(packed[0]):
        assert labels == [IGNORE_INDEX, *ids[1:]]


def attend(ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Two causal attention layers within documents, which begin where position_ids are 0."""
    hidden = table[ids] + positions[position_ids]
    document = (position_ids == 0).cumsum(-1)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    for _ in range(2):
        q = hidden[:, None]
        hidden = hidden + torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]
    return hidden


def test_a_model_reads_a_packed_document_as_it_reads_it_alone(datasets: tuple[Any, Any], chatml: Any) -> None:
    alone, packed = datasets
    generator = torch.Generator().manual_seed(0)
    table, positions = (torch.randn(chatml.vocab_size, 16, generator=generator) for _ in range(2))
    batch = collate([packed[0], packed[1]], pad_id=chatml.pad_id)
    out = attend(batch["input_ids"], batch["position_ids"], table, positions)
    for i in range(2):
        offset = 0
        for row in packed.members(i):
            ids = torch.tensor([alone[row]["input_ids"]])
            single = attend(ids, torch.arange(ids.shape[1])[None], table, positions)
            torch.testing.assert_close(out[i, offset : offset + ids.shape[1]], single[0], rtol=1e-5, atol=1e-5)
            offset += ids.shape[1]


def test_preference_rows_are_packed_in_pairs(chatml: Any) -> None:
    rows = [
        {"prompt": f"hello {i}", "chosen": [{"role": "assistant", "content": f"the cat {i} " * (i % 5 + 1)}],
         "rejected": [{"role": "assistant", "content": f"a mat {i}"}]}
        for i in range(30)
    ]  # fmt: skip
    alone, packed = load_dataset(rows, chatml), load_dataset(rows, chatml, max_seq_len=128, packing=True)
    for i in range(len(packed)):
        for side in ("chosen_", "rejected_"):
            documents = split_documents(packed[i], side)
            assert [ids for ids, _ in documents] == [alone[row][f"{side}input_ids"] for row in packed.members(i)]
        assert sum(len(packed[i][f"{side}input_ids"]) for side in ("chosen_", "rejected_")) <= 256
    tokens = sum(len(row[f"{side}_input_ids"]) for row in alone for side in ("chosen", "rejected"))
    assert packed.report["efficiency"] == round(tokens / (len(packed) * 256), 4)


def test_packing_needs_a_length(chatml: Any) -> None:
    with pytest.raises(ValueError, match="packing needs max_seq_len"):
        load_dataset([{"text": "a"}], chatml, packing=True)


def test_a_pack_names_its_rows(datasets: tuple[Any, Any]) -> None:
    alone, packed = datasets
    members = packed.members(0)
    assert packed.where(0) == ", ".join(alone.where(row) for row in members)
    assert packed.documents(0) == [alone.documents(row)[0] for row in members]
    assert not packed.is_truncated(0)
