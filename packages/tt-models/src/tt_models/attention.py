"""Grouped-query attention: https://arxiv.org/abs/2305.13245, over SDPA, flex_attention or plain matrix products.

B: batch, S: queries, K: keys, H: query heads, N: key-value heads, D: head dimension, E: hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.cpu.elementwise import rotate
from tt_models.cpu.one_query import attend_one_query
from tt_models.cpu.products import linear, linears
from tt_models.kv_cache import LayerCache
from tt_models.masks import Documents, Mask, flex_attend, interval_mask
from tt_models.rope import Rope


class Attention(nn.Module):
    """Causal self-attention with ``num_key_value_heads`` groups of query heads.

    ``rope``: rotary positions, None for none; ``window``: how many tokens back a query sees, itself included;
    ``qk_norm(head_dim)`` makes the norms of queries and keys per head; ``scale`` multiplies the scores (default
    ``head_dim ** -0.5``); ``softcap`` bounds them by ``softcap * tanh(score / softcap)``; ``sinks`` adds a learned
    score per head that is in the softmax and adds nothing to the output; ``dropout`` of the weights, in training only.

    ``rope`` and ``window`` are for the decoder, which makes the tables and masks that layers share; ``forward`` uses
    the ``rope`` and ``mask`` that it is given.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        rope: Rope | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        check_heads(hidden_size, num_attention_heads, kv_heads, head_dim, dropout)
        self.num_heads, self.num_kv_heads = num_attention_heads, kv_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rope, self.window, self.softcap, self.dropout = rope, window, softcap, dropout
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.add_projections(hidden_size, qkv_bias)
        self.o_proj = nn.Linear(num_attention_heads * self.head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if qk_norm is None else qk_norm(self.head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(self.head_dim)
        self.sinks = nn.Parameter(torch.empty(num_attention_heads)) if sinks else None

    def add_projections(self, hidden_size: int, bias: bool) -> None:
        """The linear layers that ``project`` uses."""
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=bias)

    def project(self, x_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, S, heads, D] each."""
        shape = (*x_BSE.shape[:2], -1, self.head_dim)
        q, k, v = (y.view(shape) for y in linears((self.q_proj, self.k_proj, self.v_proj), x_BSE))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(
        self,
        x_BSE: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Mask = None,
        cache: LayerCache | None = None,
        length: int = 0,
    ) -> Tensor:
        """[B, S, E] to the same shape.

        ``rope``: cos and sin. ``mask``: True if a query sees a key; None: each sees itself and all before it.
        ``cache``: has ``length`` columns already.
        """
        q, k, v = (heads.transpose(1, 2) for heads in self.project(x_BSE))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, length)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, k, v, mask=mask, scale=self.scale, softcap=self.softcap, sinks=self.sinks, dropout=dropout)
        return linear(self.o_proj, mixed.transpose(1, 2).flatten(2))

    def reset_parameters(self, std: float) -> None:
        """The sinks; all other parameters belong to submodules."""
        if self.sinks is not None:
            nn.init.normal_(self.sinks, std=std)


def attend(
    q_BHSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[B, H, S, D]. Without a mask one query sees all keys, and S queries see as many keys causally."""
    if isinstance(mask, Documents):
        settings = {"scale": scale, "softcap": softcap, "sinks": sinks, "dropout": dropout}
        return attend_each_document(q_BHSD, k_BNKD, v_BNKD, mask, **settings)
    causal = False
    if mask is None and q_BHSD.shape[2] > 1:  # a branch: with a dynamic length the comparison itself is not a bool
        causal = True
    assert not causal or q_BHSD.shape[2] == k_BNKD.shape[2], "a chunk after a cache needs its mask"
    if mask is not None and not isinstance(mask, Tensor):
        return flex_attend(q_BHSD, k_BNKD, v_BNKD, mask, scale=scale, softcap=softcap, sinks=sinks)
    if softcap is not None or sinks is not None:
        return plain_attend(q_BHSD, k_BNKD, v_BNKD, mask, scale, softcap, sinks, dropout)
    if not causal and q_BHSD.shape[2] == 1 and q_BHSD.device.type == "cpu" and not dropout:
        return attend_one_query(q_BHSD, k_BNKD, v_BNKD, mask, scale)
    grouped = q_BHSD.shape[1] != k_BNKD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSD, k_BNKD, v_BNKD, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def attend_each_document(q_BHSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, documents: Documents, **how: Any) -> Tensor:
    """The same for packed rows on a CPU: the cost is that of the documents, not of the whole row."""
    rows = []
    for index, lengths in enumerate(documents.lengths):
        parts = []
        split = [torch.split(x[index, None], lengths, dim=2) for x in (q_BHSD, k_BNSD, v_BNSD)]
        for q, k, v in zip(*split, strict=True):
            columns, window = torch.arange(q.shape[2], device=q.device), documents.window
            mask = interval_mask(None, columns, columns, window) if window and q.shape[2] > window else None
            parts.append(attend(q, k, v, mask=mask, **how))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


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
    weights = scores.float().softmax(dim=-1).to(q_BHSD.dtype)[..., :keys]
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.reshape(batch, kv_heads, -1, keys) @ v_BNKD).view(batch, heads, queries, -1)


def check_heads(hidden_size: int, heads: int, kv_heads: int, head_dim: int | None, dropout: float) -> None:
    """ValueError for numbers of heads that do not fit."""
    if kv_heads <= 0 or heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim is None and hidden_size % heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}: give head_dim")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
