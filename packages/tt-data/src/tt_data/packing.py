"""Whole documents packed into rows of at most ``max_seq_len`` tokens: best fit, longest first.

https://en.wikipedia.org/wiki/Best-fit_bin_packing. Only lengths are needed; a pack is put together when it is read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from tt_data.dataset import Piece, Row, TokenDataset, check_index
from tt_data.order import Permutation
from tt_data.store import IGNORE_INDEX

_SIDES = ("", "chosen_", "rejected_")


def pack(lengths: Sequence[int], max_seq_len: int, *, seed: int = 0) -> list[list[int]]:
    """Which documents make up each pack. No document is split; the same seed gives the same packs.

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
    """One row of many: ``position_ids`` restart at 0 with every document, whose first label is -100."""
    packed: Row = {}
    for side in _SIDES:
        if f"{side}input_ids" not in rows[0]:
            continue
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for row in rows:
            ids += row[f"{side}input_ids"]
            labels += [IGNORE_INDEX, *row[f"{side}labels"][1:]]
            positions += range(len(row[f"{side}input_ids"]))
        packed |= {f"{side}input_ids": ids, f"{side}labels": labels, f"{side}position_ids": positions}
    return packed


def refuse_judged(kind: str) -> None:
    """Raise ValueError for judged answers: a pack holds several, but one judgement."""
    if kind == "judged":
        raise ValueError("packing: unpaired preference rows have a label each, a pack has none; leave packing off")


class PackedDataset:
    """``ds[i] -> {"input_ids", "labels", "position_ids"}`` over whole documents of ``rows``."""

    def __init__(self, rows: TokenDataset, *, max_seq_len: int, seed: int = 0) -> None:
        refuse_judged(rows.kind)
        self.rows, self.max_seq_len = rows, max_seq_len
        self.tokenizer, self.pad_id, self.schema, self.kind = rows.tokenizer, rows.pad_id, rows.schema, rows.kind
        lengths = [rows.length(i) for i in range(len(rows))]
        self._flat, self._ends = array("q"), array("q", [0])
        for members in pack(lengths, max_seq_len, seed=seed):
            self._flat.extend(members)
            self._ends.append(len(self._flat))
        self.efficiency = sum(lengths) / (len(self) * max_seq_len)
        self.fingerprint = hashlib.sha256(f"{rows.fingerprint} packed {max_seq_len} {seed}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def members(self, i: int) -> list[int]:
        """The rows that pack ``i`` is made of."""
        i = check_index(i, len(self))
        return self._flat[self._ends[i] : self._ends[i + 1]].tolist()

    def __getitem__(self, i: int) -> Row:
        return join_documents([self.rows[row] for row in self.members(i)])

    def length(self, i: int) -> int:
        """Tokens of pack ``i``."""
        return sum(self.rows.length(row) for row in self.members(i))

    def where(self, i: int) -> str:
        """Where the rows of pack ``i`` were read."""
        return ", ".join(self.rows.where(row) for row in self.members(i))

    def is_truncated(self, i: int) -> bool:
        """Whether a row of pack ``i`` was cut at ``max_seq_len``."""
        return any(self.rows.is_truncated(row) for row in self.members(i))

    @property
    def report(self) -> dict[str, Any]:
        return {**self.rows.report, "packs": len(self), "efficiency": round(self.efficiency, 4)}

    def rendered(self, i: int) -> list[Piece]:
        """Pack ``i`` as text pieces and whether each is trained."""
        return [piece for document in self.documents(i) for piece in document]

    def documents(self, i: int) -> list[list[Piece]]:
        """The pieces of each document of pack ``i``."""
        return [document for row in self.members(i) for document in self.rows.documents(row)]

    def document_names(self, i: int) -> list[str]:
        """Where each document of pack ``i`` was read."""
        return [name for row in self.members(i) for name in self.rows.document_names(row)]
