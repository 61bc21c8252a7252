"""Rows of different lengths to one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
_SIDES = ("", "chosen_", "rejected_")


def collate(rows: Sequence[Mapping[str, Any]], *, pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest row: ``input_ids`` with ``pad_id``, ``labels`` with -100.

    ``position_ids``, where rows are packed, go on counting from 0 over the padding, as one more document that
    nothing learns from. Preference rows give ``chosen_`` and ``rejected_`` of each; ``desirable`` becomes bools.
    """
    import torch

    if not rows:
        raise ValueError("collate: no rows")
    batch: dict[str, Tensor] = {}
    for side in _SIDES:
        if f"{side}input_ids" not in rows[0]:
            continue
        width = max(len(row[f"{side}input_ids"]) for row in rows)
        batch[f"{side}input_ids"] = _padded([row[f"{side}input_ids"] for row in rows], width, pad_id)
        batch[f"{side}labels"] = _padded([row[f"{side}labels"] for row in rows], width, IGNORE_INDEX)
        if f"{side}position_ids" in rows[0]:
            positions = [row[f"{side}position_ids"] for row in rows]
            batch[f"{side}position_ids"] = _padded([[*p, *range(width - len(p))] for p in positions], width, 0)
    if "desirable" in rows[0]:
        batch["desirable"] = torch.tensor([bool(row["desirable"]) for row in rows])
    return batch


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    import torch

    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


def padded_collate(
    batch: Sequence[tuple[Sequence[int], Sequence[int]]], padding_idx: int = 0, ignore_idx: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Pad (ids, labels) pairs on the right to the longest of all."""
    width = max(max(len(ids), len(labels)) for ids, labels in batch)
    return _padded([ids for ids, _ in batch], width, padding_idx), _padded(
        [labels for _, labels in batch], width, ignore_idx
    )


def padded_collate_dpo(
    batch: Sequence[Mapping[str, Sequence[int]]], padding_idx: int = 0, ignore_idx: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Preference rows as one batch of twice their number: all chosen ones, then all rejected ones."""
    pairs = [(row[f"{side}input_ids"], row[f"{side}labels"]) for side in ("chosen_", "rejected_") for row in batch]
    return padded_collate(pairs, padding_idx, ignore_idx)
