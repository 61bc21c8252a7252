"""Rows of different lengths to one batch of tensors: R rows of S tokens, A answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tt_data.token_rows.dataset import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

NO_ANSWER = -1
_PAIR = ("chosen_", "rejected_")
_NAMES = ("input_ids", "labels", "position_ids")


def collate(rows: Sequence[Mapping[str, Any]], *, pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest row: ``input_ids`` with ``pad_id``, ``labels`` with -100, [R, S] each.

    If rows are packed, ``position_ids`` count from 0 over the padding: it is one more document, without loss.

    A pair is two rows, the chosen and the rejected answer; a pack of pairs is one row of all its documents.
    ``answer_ids`` [R, S] names the answer that a token, also of its prompt, belongs to: ``2p`` is the chosen and
    ``2p + 1`` the rejected answer of pair ``p``, -1 is padding. Judged answers have the ids 0, 1, ..., and
    ``desirable`` [A] is a bool for each. There are A = ``answer_ids.max() + 1`` answers. Packed or not, their
    log-probabilities are ``zeros(A).index_add(0, answer_ids[:, 1:][kept], log_probs[kept])``, with the log-probability
    of each token from the second on, and ``kept = labels[:, 1:] != -100``.

    Judged rows also give ``kl_input_ids``, ``kl_labels``, ``kl_answer_ids`` and, if they are packed,
    ``kl_position_ids``: rows of their own, in which each of the A answers belongs to another prompt.

    ``reference_log_probs`` and ``kl_reference_log_probs`` [A] are there if the rows have them: a list for each row, in
    the order of its answers.
    """
    import torch

    if not rows:
        raise ValueError("collate: no rows")
    sides = _PAIR if "chosen_input_ids" in rows[0] else ("",)
    batch = _sequences(rows, sides, pad_id, answers=sides == _PAIR or "desirable" in rows[0])
    if "kl_input_ids" in rows[0]:
        beside = _sequences(rows, ("kl_",), pad_id, answers=True)
        batch |= {f"kl_{name}": values for name, values in beside.items()}
    if "desirable" in rows[0]:
        flags = (row["desirable"] for row in rows)
        batch["desirable"] = torch.tensor([f for flag in flags for f in (flag if isinstance(flag, list) else [flag])])
    for name in ("reference_log_probs", "kl_reference_log_probs"):
        if name in rows[0]:
            batch[name] = torch.tensor([value for row in rows for value in row[name]])
    return batch


def _sequences(
    rows: Sequence[Mapping[str, Any]], sides: Sequence[str], pad_id: int, *, answers: bool
) -> dict[str, Tensor]:
    """The sides of all rows; those of a pack are joined."""
    packed = f"{sides[0]}position_ids" in rows[0]
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX} | ({"answer_ids": NO_ANSWER} if answers else {})
    sequences: list[dict[str, list[int]]] = []
    documents = 0  # each has an answer on every side
    for row in rows:
        parts = [{name: row[side + name] for name in _NAMES if side + name in row} for side in sides]
        for number, part in enumerate(parts if answers else []):
            numbers = _documents(part, documents)
            part["answer_ids"] = [document * len(sides) + number for document in numbers]
        documents += 1 + numbers[-1] - numbers[0] if answers else 0
        sequences += [{name: [i for part in parts for i in part[name]] for name in parts[0]}] if packed else parts
    width = max(len(sequence["input_ids"]) for sequence in sequences)
    batch = {name: _padded([part[name] for part in sequences], width, value) for name, value in fill.items()}
    if packed:
        positions = [[*part["position_ids"], *range(width - len(part["position_ids"]))] for part in sequences]
        batch["position_ids"] = _padded(positions, width, 0)
    return batch


def _documents(part: Mapping[str, list[int]], first: int) -> list[int]:
    """The number of each token's document: a position of 0 begins one."""
    if "position_ids" not in part:
        return [first] * len(part["input_ids"])
    return [first - 1 + begun for begun in accumulate(int(position == 0) for position in part["position_ids"])]


def without_loss(like: Mapping[str, Any], *, pad_id: int) -> dict[str, Tensor]:
    """A batch with the keys of rows such as ``like``, in which nothing is trained and no answer is."""
    row = {key: value[:2] if isinstance(value, list) else value for key, value in like.items()}
    batch = collate([row], pad_id=pad_id)
    for name in batch:
        if name.endswith(("labels", "answer_ids")):
            batch[name].fill_(IGNORE_INDEX if name.endswith("labels") else NO_ANSWER)
    return {key: value if value.dim() == 2 else value[:0] for key, value in batch.items()}


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
    pairs = [(row[f"{side}input_ids"], row[f"{side}labels"]) for side in _PAIR for row in batch]
    return padded_collate(pairs, padding_idx, ignore_idx)
