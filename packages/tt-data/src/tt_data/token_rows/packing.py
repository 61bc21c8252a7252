"""Whole documents packed into rows of at most ``max_seq_len`` tokens: best fit, longest first.

https://en.wikipedia.org/wiki/Best-fit_bin_packing. Only lengths are needed; a pack is put together when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from tt_data.token_rows.dataset import IGNORE_INDEX, Row
from tt_data.token_rows.order import Permutation

_SIDES = ("", "chosen_", "rejected_", "kl_")


def pack(lengths: Sequence[int], max_seq_len: int, *, seed: int = 0) -> list[list[int]]:
    """Which documents, or pairs of documents, make up each pack. None is split; the same seed gives the same packs.

    ``seed`` decides which of the documents of one length go together. Raises ValueError for one that is too long.
    """
    if not lengths:
        return []
    if max(lengths) > max_seq_len:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit into packs of {max_seq_len}")
    permute = Permutation(len(lengths), (seed,))
    shuffled = [permute(i) for i in range(len(lengths))]
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_seq_len + 1)]  # packs by the room that is left
    rooms = 0  # bit r is set where with_room[r] is not empty
    for document in sorted(shuffled, key=lengths.__getitem__, reverse=True):
        length = lengths[document]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            index = with_room[room].pop()
            packs[index].append(document)
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, index = max_seq_len, len(packs)
            packs.append([document])
        left = room - length
        if not with_room[left]:
            rooms |= 1 << left
        with_room[left].append(index)
    return packs


def join_documents(rows: Sequence[Row]) -> Row:
    """One row of many: ``position_ids`` restart at 0 with every document, whose first label is -100. A pack of pairs
    has two sides, a pack of judged answers a list of judgements."""
    parts, packed = cast(Sequence[dict[str, Any]], rows), dict[str, Any]()
    if "desirable" in parts[0]:
        packed["desirable"] = [row["desirable"] for row in parts]
    for name in ("reference_log_probs", "kl_reference_log_probs"):
        if name in parts[0]:
            packed[name] = [value for row in parts for value in row[name]]
    for side in _SIDES:
        if f"{side}input_ids" not in parts[0]:
            continue
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for row in parts:
            ids += row[f"{side}input_ids"]
            labels += [IGNORE_INDEX, *row[f"{side}labels"][1:]]
            positions += range(len(row[f"{side}input_ids"]))
        packed |= {f"{side}input_ids": ids, f"{side}labels": labels, f"{side}position_ids": positions}
    return cast(Row, packed)
