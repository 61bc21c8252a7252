"""``attend_in_tiles``: softmax over an interval of keys per query, as matrix products over tiles of scores.

The scores of a whole row never exist at once (https://arxiv.org/abs/2205.14135), tiles that nobody sees are not
computed, and the backward computes the others again. A tile is so large that a product reaches its rate, and stays in a
cache. Scores are fp32 even if the inputs are not. Exponentials are powers of two, for which torch has vector code.

B: batch, S: queries, K: keys, H: query heads, N: key-value heads, G: query heads that share their keys, D: head
dimension, R: rows of a tile (G for each query), C: its columns.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_models.cpu.blocks import is_eager
from tt_models.cpu.elementwise import _with_graph
from tt_models.masks import Intervals

TILE = 2**19  # scores of a tile, of all its heads, per thread
ROWS, COLUMNS = 512, 128  # of a tile in the backward
WHOLE_ROWS = 128  # of a tile in the forward, which has all columns
SHORT = 64  # documents of fewer tokens are attended together, under a mask
STEP = 32  # numbers of tokens are rounded up to a multiple: oneDNN compiles a product for each new shape
FEWEST = 64  # queries from which tiles are faster than torch
_LOG2E = math.log2(math.e)


def can_tile(q_BHSD: Tensor) -> bool:
    """Whether ``attend_in_tiles`` may be used: on a CPU, and not under torch.func, a DTensor or torch.export."""
    if torch.compiler.is_compiling():
        return q_BHSD.device.type == "cpu" and not torch.compiler.is_exporting()
    return q_BHSD.device.type == "cpu" and is_eager(q_BHSD)


def is_faster(q_BHSD: Tensor) -> bool:
    """Whether it is faster than torch's attention if each query sees all before it, on this CPU."""
    return q_BHSD.dtype in FASTER_IN and (torch.compiler.is_compiling() or q_BHSD.shape[2] >= FEWEST)


def faster_in(cpu: Mapping[str, Any]) -> frozenset[torch.dtype]:
    """In which dtypes a CPU, with ``torch.cpu.get_capabilities()``, multiplies batches much faster than torch attends.

    torch's attention makes many small products by MKL. Batches in bf16 are multiplied by oneDNN: with AVX512-BF16 at
    several times that rate. With AMX both are fast. In fp32 both are MKL's, whose small products are slow on AMD.
    """
    bf16 = cpu.get("avx512_bf16") and not cpu.get("amx_tile")
    fp32 = str(cpu.get("cpu_name", "")).startswith("AMD")
    return frozenset(dtype for dtype, fast in ((torch.bfloat16, bf16), (torch.float32, fp32)) if fast)


FASTER_IN = faster_in(torch.cpu.get_capabilities())


def attend_in_tiles(
    q_BHSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    seen: Intervals,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, H, S, D]; ``softcap`` and ``sinks`` as in ``plain_attend``."""
    if torch.is_autocast_enabled("cpu"):
        q_BHSD, k_BNKD, v_BNKD = (x.to(torch.get_autocast_dtype("cpu")) for x in (q_BHSD, k_BNKD, v_BNKD))
    mixed: Tensor = attention(q_BHSD, k_BNKD, v_BNKD, sinks, *seen, scale, softcap)[0]
    return mixed


@torch.library.custom_op("tt_models::attention", mutates_args=())
def attention(
    q_BHSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    sinks_H: Tensor | None,
    starts_BS: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """``attend_in_tiles``, and the base-2 logarithm of the sum of each query's exponentials, [B, H, S].

    An operator: the compiler, selective checkpointing and a plan of memory see one step, and what it keeps.
    """
    mixed, log_sum = results = _results(q_BHSD)
    how = _How(scale, softcap)
    with torch.autocast("cpu", enabled=False):
        for rows, keys, low in _parts(q_BHSD, k_BNKD, starts_BS, window, forward=True):
            sinks = None if sinks_H is None else sinks_H[rows[1]]
            _mix(q_BHSD[rows], k_BNKD[keys], v_BNKD[keys], sinks, *(x[rows] for x in results), low=low, how=how)
    return mixed, log_sum


@torch.library.custom_op("tt_models::attention_backward", mutates_args=())
def attention_backward(
    grad_BHSD: Tensor,
    q_BHSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    mixed_BHSD: Tensor,
    log_sum_BHS: Tensor,
    starts_BS: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, and the sum over D of ``grad`` times ``mixed``, [B, H, S]."""
    grad_q, grad_k, grad_v, dots = gradients = _gradients(q_BHSD, k_BNKD, log_sum_BHS)
    of_queries = (grad_BHSD, q_BHSD, mixed_BHSD, log_sum_BHS, grad_q, dots)
    if k_BNKD.shape[2] != q_BHSD.shape[2]:  # a window or a document may hide the first columns from all queries
        grad_k.zero_()
        grad_v.zero_()
    with torch.autocast("cpu", enabled=False):
        for rows, keys, low in _parts(q_BHSD, k_BNKD, starts_BS, window, forward=False):
            of_keys = (k_BNKD[keys], v_BNKD[keys], grad_k[keys], grad_v[keys])
            _mix_backward(*(x[rows] for x in of_queries), *of_keys, low=low, how=_How(scale, softcap))
    return gradients


def _results(q_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    return _by_token(q_BHSD), q_BHSD.new_empty(q_BHSD.shape[:3], dtype=_exact(q_BHSD.dtype))


def _gradients(q_BHSD: Tensor, k_BNKD: Tensor, log_sum_BHS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _by_token(q_BHSD), _by_token(k_BNKD), _by_token(k_BNKD), torch.empty_like(log_sum_BHS)


def _by_token(x_BHSD: Tensor) -> Tensor:
    """Memory of that shape in which the heads of a token are neighbours, as projections have them."""
    batch, heads, tokens, dim = x_BHSD.shape
    return x_BHSD.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


attention.register_fake(lambda q, *_: _results(q))
attention_backward.register_fake(lambda grad, q, k, v, mixed, log_sum, *_: _gradients(q, k, log_sum))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, sinks, starts, mixed, log_sum = ctx.saved_tensors
    window, scale, softcap = ctx.settings
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():

        def formula(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
            mask = Intervals(starts, window).dense(q.shape[2], k.shape[2], q.device)
            return plain_attend(q, k, v, mask, scale, softcap, sinks[0] if sinks else None, 0.0)

        inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
        return *_with_graph(formula, inputs, grad), *[None] * (8 - len(inputs))
    *grads, dots = attention_backward(grad, q, k, v, mixed, log_sum, starts, window, scale, softcap)
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        shares = torch.exp2(sinks.to(log_sum.dtype)[:, None] * _LOG2E - log_sum)
        grad_sinks = (shares * dots).sum((0, 2)).neg().to(sinks.dtype)
    return *grads, grad_sinks, None, None, None, None


attention.register_autograd(_backward, setup_context=_keep)


def _parts(
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
            count = max(1, TILE * torch.get_num_threads() // size)
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


class _How(NamedTuple):
    scale: float
    softcap: float | None

    @property
    def factor(self) -> float:
        """Of the queries, so that their products are scores in base 2, or what a softcap bounds."""
        return self.scale * _LOG2E if self.softcap is None else self.scale / self.softcap

    def scores(self, q_NRD: Tensor, k_NCD: Tensor) -> Tensor:
        """In base 2, [N, R, C]."""
        scores = torch.bmm(q_NRD, k_NCD.transpose(1, 2))
        return scores if self.softcap is None else scores.tanh_().mul_(self.softcap * _LOG2E)


def _stack(x_HSD: Tensor, heads: int, tokens: int, dtype: torch.dtype, extra: int = 0) -> Tensor:
    """[heads, tokens * G, D + extra], contiguous: query heads that share their keys are rows. Zeros after the end."""
    given, dim = x_HSD.shape[1:]
    stack = x_HSD.new_empty(heads, tokens, x_HSD.shape[0] // heads, dim + extra, dtype=dtype)
    stack[:, :given, :, :dim] = x_HSD.unflatten(0, (heads, -1)).transpose(1, 2)
    if given < tokens:
        stack[:, given:] = 0
    return stack.flatten(1, 2)


def _unstack(x_NR: Tensor, into_HS: Tensor) -> None:
    """Put rows that ``_stack`` arranged where they came from; both may have further dimensions."""
    into_NGS = into_HS.unflatten(0, (x_NR.shape[0], -1))
    into_NGS.copy_(x_NR.unflatten(1, (-1, into_NGS.shape[1])).transpose(1, 2)[:, :, : into_HS.shape[1]])


def _hide(scores_NRC: Tensor, query: int, key: int, ahead: int, low: list[int] | None, queries: int) -> None:
    """Put minus infinity where a query does not see a key: of the tile that begins with these two."""
    tile = scores_NRC.unflatten(1, (queries, -1))
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


def _mix(
    q_HSD: Tensor, k_NKD: Tensor, v_NKD: Tensor, sinks_H: Tensor | None, mixed_HSD: Tensor, log_sum_HS: Tensor,
    *, low: list[int] | None, how: _How,
) -> None:  # fmt: skip
    """Fill the last two."""
    (heads, given), (kv_heads, keys, dim), exact = q_HSD.shape[:2], k_NKD.shape, log_sum_HS.dtype
    group, ahead, tokens = heads // kv_heads, keys - given, -(-given // STEP) * STEP
    q = _stack(q_HSD, kv_heads, tokens, exact).mul_(how.factor)
    k, v = (_stack(x, kv_heads, ahead + tokens, dtype) for x, dtype in ((k_NKD, exact), (v_NKD, v_NKD.dtype)))
    mixed, log_sum = v.new_empty(kv_heads, tokens * group, dim), q.new_empty(kv_heads, tokens * group)
    sink = None
    if sinks_H is not None:
        sink = sinks_H.to(exact).mul(_LOG2E).view(kv_heads, 1, group)
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


def _mix_backward(
    grad_HSD: Tensor, q_HSD: Tensor, mixed_HSD: Tensor, log_sum_HS: Tensor, grad_q_HSD: Tensor, dots_HS: Tensor,
    k_NKD: Tensor, v_NKD: Tensor, grad_k_NKD: Tensor, grad_v_NKD: Tensor, *, low: list[int] | None, how: _How,
) -> None:  # fmt: skip
    """Fill the gradients, and ``dots``."""
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
            slope = None if how.softcap is None else 1 - (scores / (how.softcap * _LOG2E)).square_()
            scores.sub_(log_sum[:, rows])
            _hide(scores, query, key, ahead, low, end - query)
            weights = scores.exp2_().to(q.dtype)
            grad_scores = torch.bmm(grad[:, rows], v[:, columns].transpose(1, 2)).mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            found = torch.bmm(weights.transpose(1, 2), grad[:, rows, :dim]), torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
            sums = [x.to(exact) for x in found] if not sums else [x.add_(y) for x, y in zip(sums, found, strict=True)]
            grad_q[:, rows].add_(torch.bmm(grad_scores, k[:, columns]))
        count = keys - key
        grad_v_NKD[:, columns] = sums[0][:, :count]
        grad_k_NKD[:, columns] = sums[1].mul_(how.scale)[:, :count]
    _unstack(grad_q.mul_(how.scale), grad_q_HSD)


def plain_attend(
    q_BHSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention that SDPA does not have: softmax in fp32 over bounded scores, and over a sink."""
    batch, heads, queries, _ = q_BHSD.shape
    kv_heads, keys = k_BNKD.shape[1:3]
    q_BNGD = q_BHSD.reshape(batch, kv_heads, heads // kv_heads * queries, -1)  # the queries of a group share their keys
    scores = (q_BNGD @ k_BNKD.transpose(2, 3)).view(batch, heads, queries, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(batch, -1, queries, 1)), dim=-1)
    weights = scores.to(_exact(scores.dtype)).softmax(dim=-1).to(q_BHSD.dtype)[..., :keys]
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.reshape(batch, kv_heads, -1, keys) @ v_BNKD).view(batch, heads, queries, -1)
