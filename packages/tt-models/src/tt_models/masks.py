"""Who sees whom. Every query sees an interval of columns: from the start of its document, or of its window, to itself.

A document begins at a position id that is not one more than the last; left padding is a document that ends there.
B: batch, S: queries, K: keys, H: query heads, N: key-value heads, D: head dimension, Q, C: blocks of queries, of keys.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # what flex_attention skips or computes as a whole
SHORTEST = 8  # mean tokens of a document; below, one product of all documents is faster than one for each


class Intervals(NamedTuple):
    """Queries of the last S of K columns, each of which sees from its start, or from its window, to itself."""

    starts: Tensor | None  # int64[B or 1, S]: columns; None: column 0
    window: int | None

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The same as a boolean mask."""
        columns = torch.arange(keys, device=device)
        return interval_mask(self.starts, columns[keys - queries :], columns, self.window)


Mask: TypeAlias = "Tensor | BlockMask | Intervals | None"  # True if a query sees a key; None: itself, all before it


def document_starts(position_ids_BS: Tensor, *, offset: int = 0, first_B: Tensor | None = None) -> Tensor:
    """The column where each token's document begins, int64[B, S].

    ``offset`` is the column of the first token given; ``first_B`` are the columns where the documents that it may
    continue began.
    """
    columns = torch.arange(offset, offset + position_ids_BS.shape[1], device=position_ids_BS.device)
    begins = torch.zeros_like(position_ids_BS, dtype=torch.bool)
    begins[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    begins[:, 0] = (position_ids_BS[:, 0] == 0) & (offset > 0)
    starts = torch.where(begins, columns, 0)
    if first_B is not None:
        starts[:, 0] = torch.where(begins[:, 0], offset, first_B)
    return starts.cummax(dim=1).values


def document_lengths(position_ids_BS: Tensor, starts_BS: Tensor | None, *, offset: int = 0) -> Tensor:
    """How many tokens each token's document has up to the last one given, int64[B, S]."""
    counts = position_ids_BS + 1
    if starts_BS is None:
        return counts.amax(dim=1, keepdim=True).expand_as(counts)
    index = (starts_BS - offset).clamp(min=0)
    return torch.zeros_like(counts).scatter_reduce(1, index, counts, "amax").gather(1, index)


def split_documents(starts_BS: Tensor) -> list[list[int]] | None:
    """The lengths of the documents of rows that begin with one; None if they are too short to be attended alone."""
    batch, seq_len = starts_BS.shape
    begins = [torch.unique_consecutive(row).tolist() for row in starts_BS.unbind(0)]
    if sum(len(row) for row in begins) * SHORTEST > batch * seq_len:
        return None
    ends = [[*row[1:], seq_len] for row in begins]
    return [[e - b for b, e in zip(*pair, strict=True)] for pair in zip(begins, ends, strict=True)]


def interval_mask(starts_BS: Tensor | None, queries_S: Tensor, keys_K: Tensor, window: int | None) -> Tensor:
    """Boolean [B or 1, 1, S, K], True if the query in column ``queries_S[i]`` sees the key in ``keys_K[j]``."""
    back_SK = queries_S[:, None] - keys_K[None, :]
    sees_SK = back_SK >= 0
    if window is not None:
        sees_SK = sees_SK & (back_SK < window)
    if starts_BS is None:
        return sees_SK[None, None]
    return (sees_SK[None] & (keys_K[None, None, :] >= starts_BS[:, :, None]))[:, None]


def block_mask(starts_BS: Tensor | None, seq_len: int, window: int | None, device: torch.device) -> "BlockMask":
    """The same for flex_attention, queries and keys being the same columns, without a matrix of S by S.

    The first column that a query sees never falls from one query to the next, so a block of queries is judged by its
    first and its last one.
    """
    from torch.nn.attention.flex_attention import BlockMask

    queries_S = torch.arange(seq_len, device=device)
    lowest_BS = torch.zeros_like(queries_S)[None] if starts_BS is None else starts_BS
    if window is not None:
        lowest_BS = torch.maximum(lowest_BS, queries_S - (window - 1))
    first_Q = torch.arange(0, seq_len, BLOCK, device=device)
    last_Q = (first_Q + BLOCK - 1).clamp(max=seq_len - 1)
    begin_C, end_C = first_Q, last_Q
    some_BQC = (begin_C <= last_Q[:, None]) & (end_C >= lowest_BS[:, first_Q, None])
    complete_Q = first_Q + BLOCK <= seq_len
    whole_BQC = (end_C <= first_Q[:, None]) & (begin_C >= lowest_BS[:, last_Q, None]) & complete_Q[:, None] & complete_Q

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= lowest_BS[batch if starts_BS is not None else 0, query])

    counts, indices = ordered_blocks(some_BQC & ~whole_BQC)
    whole_counts, whole_indices = ordered_blocks(whole_BQC)
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(seq_len, seq_len)
    )


def ordered_blocks(visible_BQC: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries sees, int32[B, 1, Q], and which, those first, int32[B, 1, Q, C]."""
    indices = visible_BQC.int().argsort(dim=-1, descending=True, stable=True)
    return visible_BQC.sum(-1).int()[:, None], indices.int()[:, None]


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """flex_attention through the compiler, without which it would keep all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attend(
    q_BHSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    mask: "BlockMask",
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, H, S, D] by flex_attention, which on CUDA runs compiled and never stores the scores."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def bounded(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    flex: Callable[..., Any] = flex_attention
    if q_BHSD.device.type == "cuda" and not torch.compiler.is_compiling():
        flex = compiled_flex_attention()
    mixed, extra = flex(
        q_BHSD,
        k_BNKD,
        v_BNKD,
        score_mod=None if softcap is None else bounded,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHSD.shape[1] != k_BNKD.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is None:
        return mixed  # type: ignore[no-any-return]
    share = torch.sigmoid(extra.lse - sinks.float()[:, None])  # of the softmax that is left once the sink took its part
    return mixed * share[..., None].to(mixed.dtype)  # type: ignore[no-any-return]
