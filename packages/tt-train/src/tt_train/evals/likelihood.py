"""How likely continuations are behind their contexts, a batch at a time.

G: contexts, R: rows, S: tokens of a context, C: of a continuation, N: scored positions, D: hidden size, V: vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import tt_models
from tt_models.prompts import left_padded, left_padded_positions
from tt_train.losses.chunks import by_rows_, chunk_of, probabilities

Ids = tuple[int, ...]
Group = tuple[Ids, list[Ids]]  # a context and its continuations


class Scored(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities, and whether each is the likeliest one."""

    log_prob: float
    greedy: bool


def in_one_row(group: Group) -> bool:
    """Whether the continuations differ in their last token only: then one text has all of their positions."""
    first = group[1][0]
    return all(after[:-1] == first[:-1] for after in group[1])


@torch.no_grad()
def score(model: tt_models.Decoder, batch: Sequence[Group]) -> list[Scored]:
    """Of each continuation of each context, in their order. A context is read once for all of its continuations."""
    device = model.output_weight.device
    conts = [after for _, of in batch for after in of]
    counts = torch.tensor([len(of) for _, of in batch], device=device)
    lengths = torch.tensor([len(after) for after in conts], device=device)
    labels_RC = _padded(conts, device)
    filled_RC = _filled(lengths, labels_RC)
    if all(map(in_one_row, batch)):
        hidden_GSD = _read(model, [(*context, *of[0][:-1]) for context, of in batch])
        first = torch.tensor([len(context) - 1 for context, _ in batch], device=device).repeat_interleave(counts)
        row_N, column_N = filled_RC.nonzero(as_tuple=True)
        row_of = torch.arange(len(batch), device=device).repeat_interleave(counts)
        hidden_ND = hidden_GSD[row_of[row_N], first[row_N] + column_N]
    else:
        hidden_RCD = _read_on(model, [context for context, _ in batch], counts, labels_RC[:, :-1])
        row_N, hidden_ND = filled_RC.nonzero()[:, 0], hidden_RCD[filled_RC]
    log_probs_N, likeliest_N = _next_token(model, hidden_ND, labels_RC[filled_RC])
    sums = torch.zeros(len(conts), dtype=torch.float64, device=device).index_add_(0, row_N, log_probs_N.double())
    misses = torch.zeros(len(conts), dtype=torch.int64, device=device).index_add_(0, row_N, (~likeliest_N).long())
    return [Scored(total, missed == 0) for total, missed in zip(sums.tolist(), misses.tolist(), strict=True)]


def _padded(rows: Sequence[Ids], device: torch.device) -> Tensor:
    """Rows of ids, filled up behind their ends."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _filled(lengths: Tensor, ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def _read(model: tt_models.Decoder, rows: Sequence[Ids]) -> Tensor:
    """Hidden states of texts. What fills a row up is behind its end, where no token of the text sees it."""
    ids = _padded(rows, model.output_weight.device)
    if all(rope is None or not rope.by_length for rope in model.model.ropes):
        return model.hidden_states(ids)
    filled = _filled(torch.tensor([len(row) for row in rows], device=ids.device), ids)
    return model.hidden_states(ids, torch.arange(ids.shape[1], device=ids.device) * filled)  # documents of their own


def _read_on(model: tt_models.Decoder, contexts: Sequence[Ids], counts: Tensor, after_RC: Tensor) -> Tensor:
    """Hidden states [R, 1 + C, D] of the last token of each context and of the tokens behind it.

    ``counts`` [G]: rows of ``after_RC`` that are behind each context.
    """
    ids, lengths = left_padded(contexts, None, 0, model)
    weight = model.model.embed_tokens.weight
    room = ids.shape[1] + after_RC.shape[1]
    cache = tt_models.KVCache(
        model.config, batch_size=len(contexts), max_seq_len=room, device=weight.device, dtype=weight.dtype
    )
    last_GD = model.hidden_states(ids, left_padded_positions(ids, lengths), cache)[:, -1]
    cache.repeat_rows(counts)
    behind_RCD = model.hidden_states(after_RC, None, cache)
    return torch.cat((last_GD.repeat_interleave(counts, dim=0)[:, None], behind_RCD), dim=1)


def _next_token(model: tt_models.Decoder, hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each label in fp32, and whether it is the likeliest token; never all logits at once."""
    log_probs_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
    likeliest_N = torch.empty_like(log_probs_N, dtype=torch.bool)
    for start in range(0, len(labels_N), size := chunk_of(model.output_weight)):
        part = slice(start, start + size)
        by_rows_(_of_rows, model.logits(hidden_ND[part]), labels_N[part], log_probs_N[part], likeliest_N[part])
    return log_probs_N, likeliest_N


def _of_rows(logits_RV: Tensor, labels_R: Tensor, log_probs_R: Tensor, likeliest_R: Tensor) -> None:
    picked_R = logits_RV.gather(1, labels_R[:, None]).squeeze(1)
    torch.sub(picked_R, probabilities(logits_RV)[1], out=log_probs_R)
    torch.eq(logits_RV.argmax(dim=-1), labels_R, out=likeliest_R)
