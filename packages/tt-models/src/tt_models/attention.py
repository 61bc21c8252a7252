"""Grouped-query attention over SDPA: https://arxiv.org/abs/2305.13245.

B: batch, S: queries, K: keys, H: query heads, N: key-value heads, D: head dimension, E: hidden size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.kv_cache import LayerCache
from tt_models.rope import Rope, rotate


class Attention(nn.Module):
    """Causal self-attention; ``num_key_value_heads`` query groups, rotary positions, optionally a sliding window.

    Dropout acts on the attention weights, in training only.
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
        rope: Rope | None = None,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        check_heads(hidden_size, num_attention_heads, kv_heads, head_dim, dropout)
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rope, self.window, self.dropout = rope, window, dropout
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_attention_heads * self.head_dim, hidden_size, bias=output_bias)

    def project(self, x_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, heads, S, D] each."""
        shape = (*x_BSE.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x_BSE).view(shape).transpose(1, 2) for projection in projections)
        return q, k, v

    def forward(
        self,
        x_BSE: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        length: int = 0,
    ) -> Tensor:
        """[B, S, E] to the same shape.

        ``rope``: cos and sin; ``mask``: True where a query sees a key, None: each sees itself and all before it;
        ``cache`` holds ``length`` columns already.
        """
        q, k, v = self.project(x_BSE)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, length)
        mixed = attend(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attend(q_BHSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, *, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """[B, H, S, D]. Without a mask one query sees all keys, and S queries see as many keys causally."""
    causal = mask is None and q_BHSD.shape[2] > 1
    assert not causal or q_BHSD.shape[2] == k_BNKD.shape[2], "a chunk after a cache needs its mask"
    grouped = q_BHSD.shape[1] != k_BNKD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSD, k_BNKD, v_BNKD, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def check_heads(hidden_size: int, heads: int, kv_heads: int, head_dim: int | None, dropout: float) -> None:
    """ValueError for what cannot be built."""
    if kv_heads <= 0 or heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim is None and hidden_size % heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}: give head_dim")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
