"""Who sees whom. Every query sees an interval of columns: from the start of its document, or of its window, to itself.

A document begins where position ids do not go on by one; left padding is a document that nobody goes on with.
B: batch, S: queries, K: keys.
"""

import torch
from torch import Tensor


def document_starts(position_ids_BS: Tensor, *, offset: int = 0, first_B: Tensor | None = None) -> Tensor:
    """The column where each token's document begins, int64[B, S].

    ``offset`` is the column of the first token given, and ``first_B`` where the documents that it may continue began.
    A row whose first position is 0 at a later column begins a new document there.
    """
    seq_len = position_ids_BS.shape[1]
    columns = torch.arange(offset, offset + seq_len, device=position_ids_BS.device)
    begins = torch.zeros_like(position_ids_BS, dtype=torch.bool)
    begins[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    begins[:, 0] = (position_ids_BS[:, 0] == 0) & (offset > 0)
    starts = torch.where(begins, columns, 0)
    if first_B is not None:
        starts[:, 0] = torch.where(begins[:, 0], starts[:, 0], first_B)
    return starts.cummax(dim=1).values


def interval_mask(starts_BS: Tensor | None, queries_S: Tensor, keys_K: Tensor, window: int | None) -> Tensor:
    """Boolean [B or 1, 1, S, K], True where the query in column ``queries_S[i]`` sees the key in ``keys_K[j]``."""
    back_SK = queries_S[:, None] - keys_K[None, :]
    sees_SK = back_SK >= 0
    if window is not None:
        sees_SK = sees_SK & (back_SK < window)
    if starts_BS is None:
        return sees_SK[None, None]
    return (sees_SK[None] & (keys_K[None, None, :] >= starts_BS[:, :, None]))[:, None]
