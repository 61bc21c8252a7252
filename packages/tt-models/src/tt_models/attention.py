"""Grouped-query attention: https://arxiv.org/abs/2305.13245, over SDPA, flex_attention or plain matrix products.

B: batch, S: queries, K: keys, H: query heads, N: key-value heads, D: head dimension, E: hidden size.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.cpu.attention import attend_in_tiles, can_tile, is_faster, plain_attend
from tt_models.cpu.elementwise import rotate
from tt_models.cpu.one_query import attend_one_query
from tt_models.cpu.products import linear, linears
from tt_models.kv_cache import LayerCache
from tt_models.masks import Intervals, Mask, flex_attend, split_documents
from tt_models.rope import Rope

MOST = 0.9  # of the tokens: copies of more (and a second compiled graph) would save next to nothing


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
        rows: Tensor | None = None,
    ) -> Tensor:
        """[B, S, E] to the same shape, or [1, N, E] for ``rows`` [N]: see ``take``.

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
        return linear(self.o_proj, take(mixed.transpose(1, 2).flatten(2), rows))

    def reset_parameters(self, std: float) -> None:
        """The sinks; all other parameters belong to submodules."""
        if self.sinks is not None:
            nn.init.normal_(self.sinks, std=std)


def kept_rows(keep_BS: Tensor, input_ids_BS: Tensor) -> Tensor | None:
    """The numbers of the tokens to keep among all B x S, [N]; None for all of them."""
    if keep_BS.shape != input_ids_BS.shape or keep_BS.dtype != torch.bool:
        got = f"{list(keep_BS.shape)} of {keep_BS.dtype}"
        raise ValueError(f"keep must be booleans of the shape of input_ids, {list(input_ids_BS.shape)}; got {got}")
    rows = keep_BS.flatten().nonzero().squeeze(1)
    return None if rows.numel() == keep_BS.numel() else rows


def leaves_out(block: nn.Module, rows: Tensor, tokens: int) -> bool:
    """Whether a block computes ``rows`` alone: its ``forward`` names them, and enough others to pay for the copies.

    A block that only hands its keywords on would add what does not fit.
    """
    return rows.numel() <= MOST * tokens and "rows" in inspect.signature(type(block).forward).parameters


def take(x_BSE: Tensor, rows: Tensor | None) -> Tensor:
    """[1, N, E]: the tokens numbered ``rows`` among all B x S; None takes all, as they are."""
    return x_BSE if rows is None else x_BSE.flatten(0, 1).index_select(0, rows)[None]


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
    causal = False
    if mask is None and q_BHSD.shape[2] > 1:  # a branch: with a dynamic length the comparison itself is not a bool
        causal = True
    assert not causal or q_BHSD.shape[2] == k_BNKD.shape[2], "a chunk after a cache needs its mask"
    extras: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    if (causal or isinstance(mask, Intervals)) and not dropout and can_tile(q_BHSD):
        seen = mask if isinstance(mask, Intervals) else Intervals(None, None)
        mixed = attend_on_cpu(q_BHSD, k_BNKD, v_BNKD, seen, **extras)
        if mixed is not None:
            return mixed
    if isinstance(mask, Intervals):
        mask = mask.dense(q_BHSD.shape[2], k_BNKD.shape[2], q_BHSD.device)
    if mask is not None and not isinstance(mask, Tensor):
        return flex_attend(q_BHSD, k_BNKD, v_BNKD, mask, **extras)
    if softcap is not None or sinks is not None:
        return plain_attend(q_BHSD, k_BNKD, v_BNKD, mask, scale, softcap, sinks, dropout)
    if not causal and q_BHSD.shape[2] == 1 and q_BHSD.device.type == "cpu" and not dropout:
        return attend_one_query(q_BHSD, k_BNKD, v_BNKD, mask, scale)
    grouped = q_BHSD.shape[1] != k_BNKD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSD, k_BNKD, v_BNKD, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def attend_on_cpu(q_BHSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, seen: Intervals, **extras: Any) -> Tensor | None:
    """The same in tiles, or document by document; None if nothing is faster than one call of torch's attention."""
    faster = is_faster(q_BHSD, documents=seen.starts is not None)
    if faster or extras["softcap"] is not None or extras["sinks"] is not None:
        return attend_in_tiles(q_BHSD, k_BNKD, v_BNKD, seen, **extras)
    whole = q_BHSD.shape[2] == k_BNKD.shape[2] and not torch.compiler.is_compiling()
    lengths = split_documents(seen.starts.expand(q_BHSD.shape[0], -1)) if whole and seen.starts is not None else None
    if lengths is None:
        return attend_in_tiles(q_BHSD, k_BNKD, v_BNKD, seen, **extras) if seen.window is not None else None
    rows = []
    for index, row in enumerate(lengths):
        split = [torch.split(x[index, None], row, dim=2) for x in (q_BHSD, k_BNKD, v_BNKD)]
        narrow = [Intervals(None, seen.window) if seen.window and length > seen.window else None for length in row]
        parts = zip(*split, narrow, strict=True)
        rows.append(torch.cat([attend(q, k, v, mask=mask, **extras) for q, k, v, mask in parts], dim=2))
    return torch.cat(rows)


def check_heads(hidden_size: int, heads: int, kv_heads: int, head_dim: int | None, dropout: float) -> None:
    """ValueError for numbers of heads that do not fit."""
    if kv_heads <= 0 or heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim is None and hidden_size % heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}: give head_dim")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
