"""Attention of one query per row, as in decoding: the suite decode of benchmarks/ shows what it saves.

B: batch, H: query heads, N: key-value heads, G: query heads of a group, K: keys, D: head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_models.cpu.blocks import is_eager
from tt_models.cpu.products import kernel

BLOCK = 2**19  # elements of a block of keys in fp32


def attend_one_query(q_BH1D: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask_B11K: Tensor | None, scale: float) -> Tensor:
    """[B, H, 1, D]. The query heads of a group are the queries of their keys, which are then read once."""
    batch, heads, _, dim = q_BH1D.shape
    q_BNGD = q_BH1D.reshape(batch, k_BNKD.shape[1], -1, dim)
    if q_BNGD.shape[2] == 1 and _by_products(q_BH1D, k_BNKD, v_BNKD):
        return _alone(q_BH1D, k_BNKD, v_BNKD, mask_B11K, scale)
    mixed = F.scaled_dot_product_attention(q_BNGD, k_BNKD, v_BNKD, attn_mask=mask_B11K, scale=scale)
    return mixed.reshape(batch, heads, 1, dim)


def _by_products(*tensors: Tensor) -> bool:
    """Whether ``_alone`` is faster: SDPA multiplies bf16 by MKL, which is slow for one row, where oneDNN is not."""
    plain = all(is_eager(x) and x.dtype == torch.bfloat16 for x in tensors) and not torch.is_grad_enabled()
    return plain and not torch.is_autocast_enabled("cpu") and kernel() == "avx512_bf16"


def _alone(q_BH1D: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_B11K: Tensor | None, scale: float) -> Tensor:
    """Rounded as SDPA rounds: scores and softmax in fp32, weights and output in bf16."""
    q_R1D, k_RKD, v_RKD = (x.flatten(0, 1) for x in (q_BH1D, k_BHKD, v_BHKD))
    mixed_R1D, rows = torch.empty_like(q_R1D), max(1, BLOCK // k_RKD[0].numel())
    q_R1D = q_R1D.float() * scale
    hidden = None
    if mask_B11K is not None:
        shape = (*q_BH1D.shape[:2], 1, k_RKD.shape[1])
        hidden = (
            torch.zeros(mask_B11K.shape).masked_fill_(~mask_B11K, -torch.inf).expand(shape).reshape(-1, 1, shape[-1])
        )
    for at in range(0, len(q_R1D), rows):
        part = slice(at, at + rows)
        keys_RDK = k_RKD[part].float().transpose(1, 2)
        scores = torch.bmm(q_R1D[part], keys_RDK)
        if hidden is not None:
            scores += hidden[part]
        torch.bmm(scores.softmax(-1).to(v_RKD.dtype), v_RKD[part], out=mixed_R1D[part])
    return mixed_R1D.view(q_BH1D.shape)
