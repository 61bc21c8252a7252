"""``attend_in_tiles``: attention that never holds the scores of a whole row, and when it is used.

B: batch, S: queries, K: keys, H: query heads, N: key-value heads, D: head dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_models.cpu.blocks import is_eager
from tt_models.cpu.elementwise import _with_graph
from tt_models.cpu.products import Kernel, kernel
from tt_models.cpu.tiles import LOG2E, Scores, by_token, exact_dtype, mix, mix_backward, parts
from tt_models.masks import Intervals

FEWEST = 64  # queries from which an interval per query is better than a mask
WORTH = 2**19  # scores of all heads of a row from which tiles pay their calls
LONGEST, LONGEST_NARROW = 4096, 512  # queries up to which they were measured to be faster; of narrow heads
WIDE = 64  # elements of a head that is not narrow: the calls of a tile grow less than its products
FEWEST_FORWARD = 512  # queries of one document from which the forward alone is, of heads that are not narrow


def can_tile(q_BHSD: Tensor) -> bool:
    """Whether ``attend_in_tiles`` may be used: on a CPU, and not under torch.func, a DTensor or torch.export."""
    if torch.compiler.is_compiling():
        formula = torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()
        return q_BHSD.device.type == "cpu" and not formula
    return q_BHSD.device.type == "cpu" and is_eager(q_BHSD)


def is_faster(q_BHSD: Tensor, *, documents: bool = False) -> bool:
    """Whether it is faster than torch's attention without a window, on this CPU; its backward is what gains most.

    A compiled graph serves all lengths: there the dtype and the width of a head decide.
    """
    wide = q_BHSD.shape[3] >= WIDE
    if q_BHSD.dtype not in FASTER_IN or torch.compiler.is_compiling():
        return wide and q_BHSD.dtype in FASTER_IN
    heads, queries = q_BHSD.shape[1:3]
    if not torch.is_grad_enabled() and (documents or queries < FEWEST_FORWARD or not wide):
        return False
    return queries <= (LONGEST if wide else LONGEST_NARROW) and heads * queries * queries >= WORTH


def faster_in(products: Kernel) -> frozenset[torch.dtype]:
    """In which dtypes a CPU with these instructions multiplies batches much faster than torch attends.

    torch's attention makes many small products by MKL. Batches in bf16 are multiplied by oneDNN: with AVX512-BF16 at
    several times that rate. With AMX both are fast, and in fp32 both are MKL's.
    """
    return frozenset([torch.bfloat16] if products == "avx512_bf16" else [])


FASTER_IN = faster_in(kernel())


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


def _forward(
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
    how = Scores(scale, softcap)
    with torch.autocast("cpu", enabled=False):
        for rows, keys, low in parts(q_BHSD, k_BNKD, starts_BS, window, forward=True):
            sinks = None if sinks_H is None else sinks_H[rows[1]]
            mix(q_BHSD[rows], k_BNKD[keys], v_BNKD[keys], sinks, *(x[rows] for x in results), low=low, how=how)
    return mixed, log_sum


def _gradients_of(
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
        for rows, keys, low in parts(q_BHSD, k_BNKD, starts_BS, window, forward=False):
            of_keys = (k_BNKD[keys], v_BNKD[keys], grad_k[keys], grad_v[keys])
            mix_backward([x[rows] for x in of_queries], of_keys, low, Scores(scale, softcap))
    return gradients


def _results(q_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    return by_token(q_BHSD), q_BHSD.new_empty(q_BHSD.shape[:3], dtype=exact_dtype(q_BHSD.dtype))


def _gradients(q_BHSD: Tensor, k_BNKD: Tensor, log_sum_BHS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return by_token(q_BHSD), by_token(k_BNKD), by_token(k_BNKD), torch.empty_like(log_sum_BHS)


# not by torch.library.custom_op, whose first call would load torch._dynamo
for name, function in (("attention", _forward), ("attention_backward", _gradients_of)):
    torch.library.define(f"tt_models::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(f"tt_models::{name}", "CPU", function)
attention, attention_backward = torch.ops.tt_models.attention, torch.ops.tt_models.attention_backward
torch.library.register_fake("tt_models::attention", lambda q, *_: _results(q))
torch.library.register_fake(
    "tt_models::attention_backward", lambda grad, q, k, v, mixed, log_sum, *_: _gradients(q, k, log_sum)
)


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
        shares = torch.exp2(sinks.to(log_sum.dtype)[:, None] * LOG2E - log_sum)
        grad_sinks = (shares * dots).sum((0, 2)).neg().to(sinks.dtype)
    return *grads, grad_sinks, None, None, None, None


torch.library.register_autograd("tt_models::attention", _backward, setup_context=_keep)
OPERATOR = torch.ops.tt_models.attention.default


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
    weights = scores.to(exact_dtype(scores.dtype)).softmax(dim=-1).to(q_BHSD.dtype)[..., :keys]
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.reshape(batch, kv_heads, -1, keys) @ v_BNKD).view(batch, heads, queries, -1)
