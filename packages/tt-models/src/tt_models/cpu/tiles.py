"""Softmax over an interval of keys per query, as matrix products over tiles of scores, and its gradients.

The scores of a whole row never exist at once (https://arxiv.org/abs/2205.14135), tiles that nobody sees are not
computed, and the backward computes the others again. A tile is so large that a product reaches its rate, and stays in a
cache. Scores are fp32 even if the inputs are not. Exponentials are powers of two, for which torch has vector code.

B: batch, S: queries, K: keys, H: query heads, N: key-value heads, G: query heads that share their keys, D: head
dimension, R: rows of a tile (G for each query), C: its columns.

``tt_models.cpu.attention`` makes an operator of it, and decides when it is used; this file has the arithmetic.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 2**19  # scores of a tile, of all its heads, per thread; half of it in the forward
ROWS, COLUMNS = 512, 128  # of a tile in the backward
WHOLE_ROWS = 128  # of a tile in the forward, which has all columns
SHORT = 64  # documents of fewer tokens are attended together, under a mask
STEP = 32  # numbers of tokens are rounded up to a multiple: oneDNN compiles a product for each new shape
LOG2E = math.log2(math.e)


def parts(
    q_BHSD: Tensor, k_BNKD: Tensor, starts_BS: Tensor | None, window: int | None, *, forward: bool
) -> Iterator[tuple[tuple[int, slice, slice], tuple[int, slice, slice], list[int] | None]]:
    """Row of the batch, heads and tokens of each part that is computed on its own: of queries, and of keys."""
    (batch, heads, queries), (kv_heads, keys) = q_BHSD.shape[:3], k_BNKD.shape[1:3]
    group = heads // kv_heads
    for b in range(batch):
        starts_S = None if starts_BS is None else starts_BS[b % starts_BS.shape[0]]
        for rows, columns, low in pieces(starts_S, queries, keys, window):
            length, width = rows.stop - rows.start, columns.stop - columns.start
            if forward:
                size = WHOLE_ROWS * min(width, width if window is None else window + WHOLE_ROWS)
            else:
                size = min(ROWS, group * length) * min(COLUMNS, width)
            count = max(1, TILE * torch.get_num_threads() // (2 * size if forward else size))
            for n in range(0, kv_heads, count):
                last = min(n + count, kv_heads)
                yield (b, slice(n * group, last * group), rows), (b, slice(n, last), columns), low


def pieces(
    starts_S: Tensor | None, queries: int, keys: int, window: int | None
) -> Iterator[tuple[slice, slice, list[int] | None]]:
    """The documents of a row, short ones together: their queries, and the columns of the keys that these see.

    Last, which of these columns is the first that each query sees; None: the first of all.
    """
    ahead = keys - queries  # the column of the first query
    low = [0] * queries if starts_S is None else starts_S.tolist()
    cuts = [0]
    for start in () if starts_S is None else torch.unique_consecutive(starts_S).tolist():
        if start - ahead - cuts[-1] >= SHORT:
            cuts.append(start - ahead)
    if window is not None:
        low = [max(start, ahead + query - window + 1) for query, start in enumerate(low)]
    for begin, end in zip(cuts, [*cuts[1:], queries], strict=True):
        first = low[begin]
        own = [key - first for key in low[begin:end]]
        yield slice(begin, end), slice(first, ahead + end), own if own[-1] else None


class Scores(NamedTuple):
    scale: float
    softcap: float | None

    @property
    def factor(self) -> float:
        """Of the queries, so that their products are scores in base 2, or what a softcap bounds."""
        return self.scale * LOG2E if self.softcap is None else self.scale / self.softcap

    def scores(self, q_NRD: Tensor, k_NCD: Tensor) -> Tensor:
        """In base 2, [N, R, C]."""
        scores = torch.bmm(q_NRD, k_NCD.transpose(1, 2))
        return scores if self.softcap is None else scores.tanh_().mul_(self.softcap * LOG2E)


def _stack(x_HSD: Tensor, heads: int, tokens: int, dtype: torch.dtype, extra: int = 0) -> Tensor:
    """[heads, tokens * G, D + extra], contiguous: query heads that share their keys are rows. Zeros after the end."""
    given, dim = x_HSD.shape[1:]
    stack = x_HSD.new_empty(heads, tokens, x_HSD.shape[0] // heads, dim + extra, dtype=dtype)
    stack[:, :given, :, :dim] = torch.unflatten(x_HSD, 0, (heads, -1)).transpose(1, 2)
    if given < tokens:
        stack[:, given:] = 0
    return stack.flatten(1, 2)


def _unstack(x_NR: Tensor, into_HS: Tensor) -> None:
    """Put rows that ``_stack`` arranged where they came from; both may have further dimensions."""
    into_NGS = torch.unflatten(into_HS, 0, (x_NR.shape[0], -1))
    into_NGS.copy_(torch.unflatten(x_NR, 1, (-1, into_NGS.shape[1])).transpose(1, 2)[:, :, : into_HS.shape[1]])


def _hide(scores_NRC: Tensor, query: int, key: int, ahead: int, low: list[int] | None, queries: int) -> None:
    """Put minus infinity where a query does not see a key: of the tile that begins with these two."""
    tile = torch.unflatten(scores_NRC, 1, (queries, -1))
    columns = torch.arange(key, key + tile.shape[3])
    own = torch.arange(ahead + query, ahead + query + queries)[:, None]
    late, skipped = min(queries, int(columns[-1]) - ahead - query), max(0, ahead + query + 1 - key)
    if late > 0:
        _forbid(tile[:, :late, :, skipped:], columns[skipped:] > own[:late])
    if low is not None:
        begins = low[query : query + queries]
        begins += [low[-1]] * (queries - len(begins))
        early, some = bisect_right(begins, key), begins[-1] - key
        if early < queries:
            _forbid(tile[:, early:, :, :some], columns[:some] < torch.tensor(begins[early:])[:, None])


def _forbid(tile_NSGC: Tensor, hidden_SC: Tensor) -> None:
    tile_NSGC.add_(torch.where(hidden_SC, -torch.inf, 0.0).to(tile_NSGC.dtype)[:, None])


def mix(
    q_HSD: Tensor, k_NKD: Tensor, v_NKD: Tensor, sinks_H: Tensor | None, mixed_HSD: Tensor, log_sum_HS: Tensor,
    *, low: list[int] | None, how: Scores,
) -> None:  # fmt: skip
    """Fill the last two."""
    (heads, given), (kv_heads, keys, dim), exact = q_HSD.shape[:2], k_NKD.shape, log_sum_HS.dtype
    group, ahead, tokens = heads // kv_heads, keys - given, -(-given // STEP) * STEP
    q = _stack(q_HSD, kv_heads, tokens, exact).mul_(how.factor)
    k, v = (_stack(x, kv_heads, ahead + tokens, dtype) for x, dtype in ((k_NKD, exact), (v_NKD, v_NKD.dtype)))
    mixed, log_sum = v.new_empty(kv_heads, tokens * group, dim), q.new_empty(kv_heads, tokens * group)
    sink = None
    if sinks_H is not None:
        sink = sinks_H.to(exact).mul(LOG2E).view(kv_heads, 1, group)
    step = max(STEP // group, min(WHOLE_ROWS, TILE // keys) // group, 1)
    for query in range(0, tokens, step):
        end = min(query + step, tokens)
        rows = slice(query * group, end * group)
        key = 0 if low is None else low[min(query, given - 1)] // STEP * STEP
        scores = how.scores(q[:, rows], k[:, key : ahead + end])
        _hide(scores, query, key, ahead, low, end - query)
        top = scores.amax(-1, keepdim=True)
        if sink is not None:
            sink_rows = sink.expand(-1, end - query, -1).reshape(kv_heads, -1, 1)
            top = torch.maximum(top, sink_rows)
        total = scores.sub_(top).exp2_().sum(-1, keepdim=True)
        if sink is not None:
            total += torch.exp2(sink_rows - top)
        torch.add(top[..., 0], total[..., 0].log2(), out=log_sum[:, rows])
        weights = scores.mul_(total.reciprocal_()).to(v.dtype)
        mixed[:, rows] = torch.bmm(weights, v[:, key : ahead + end])
    _unstack(mixed, mixed_HSD)
    _unstack(log_sum, log_sum_HS)


def mix_backward(of_queries: Sequence[Tensor], of_keys: Sequence[Tensor], low: list[int] | None, how: Scores) -> None:
    """Fill the gradients, and ``dots``."""
    grad_HSD, q_HSD, mixed_HSD, log_sum_HS, grad_q_HSD, dots_HS = of_queries
    k_NKD, v_NKD, grad_k_NKD, grad_v_NKD = of_keys
    (heads, given), (kv_heads, keys, dim), exact = q_HSD.shape[:2], k_NKD.shape, log_sum_HS.dtype
    group, ahead, tokens = heads // kv_heads, keys - given, -(-given // STEP) * STEP
    q, k = _stack(q_HSD, kv_heads, tokens, q_HSD.dtype), _stack(k_NKD, kv_heads, ahead + tokens, q_HSD.dtype)
    exact_q, exact_k = torch.mul(q, how.factor) if q.dtype == exact else q.to(exact).mul_(how.factor), k.to(exact)
    # two more elements, so that the product of gradients and values is less its mean before it is rounded
    grad, v = _stack(grad_HSD, kv_heads, tokens, q.dtype, 2), _stack(v_NKD, kv_heads, ahead + tokens, q.dtype, 2)
    dots = (grad[..., :dim].to(exact) * _stack(mixed_HSD, kv_heads, tokens, exact)).sum(-1)
    _unstack(dots, dots_HS)
    grad[..., dim] = dots.neg_()
    grad[..., dim + 1] = dots - grad[..., dim]
    v[..., dim:] = 1
    log_sum = _stack(log_sum_HS[..., None], kv_heads, tokens, exact)
    grad_q = torch.zeros_like(exact_q)
    for key in range(0, keys, COLUMNS):
        columns = slice(key, min(key + COLUMNS, ahead + tokens))
        first, last = max(0, key - ahead), tokens
        if low is not None and low[-1] >= columns.stop:
            last = bisect_left(low, columns.stop)
        parts = -(-(last - first) * group // ROWS)
        step = -(-(last - first) // parts)
        sums: list[Tensor] = []
        for query in range(first, last, step):
            end = min(query + step, last)
            rows = slice(query * group, end * group)
            scores = how.scores(exact_q[:, rows], exact_k[:, columns])
            slope = None if how.softcap is None else 1 - (scores / (how.softcap * LOG2E)).square_()
            scores.sub_(log_sum[:, rows])
            _hide(scores, query, key, ahead, low, end - query)
            weights = scores.exp2_().to(q.dtype)
            grad_scores = torch.bmm(grad[:, rows], v[:, columns].transpose(1, 2)).mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            found = (
                torch.bmm(weights.transpose(1, 2), grad[:, rows, :dim]),
                torch.bmm(grad_scores.transpose(1, 2), q[:, rows]),
            )
            sums = [x.to(exact) for x in found] if not sums else [x.add_(y) for x, y in zip(sums, found, strict=True)]
            grad_q[:, rows].add_(torch.bmm(grad_scores, k[:, columns]))
        count = keys - key
        grad_v_NKD[:, columns] = sums[0][:, :count]
        grad_k_NKD[:, columns] = sums[1].mul_(how.scale)[:, :count]
    _unstack(grad_q.mul_(how.scale), grad_q_HSD)


def by_token(x_BHSD: Tensor) -> Tensor:
    """Memory of that shape in which the heads of a token are neighbours, as projections have them."""
    batch, heads, tokens, dim = x_BHSD.shape
    return x_BHSD.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
