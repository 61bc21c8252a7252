"""Root mean square normalization, computed in fp32: https://arxiv.org/abs/1910.07467.

Three roundings exist among the families; in fp32 the first two are the same.
"""

import torch
from torch import Tensor, nn

from tt_models.cpu.blocks import by_rows
from tt_models.cpu.elementwise import rms_norm


class RMSNorm(nn.Module):
    """``y = w * x / sqrt(mean(x^2) + eps)``, rounded to the dtype of ``x`` before the weight (Llama and most)."""

    def __init__(self, size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.numel()}, eps={self.eps}"


class LateRoundingRMSNorm(RMSNorm):
    """The same, rounded after the weight (OLMo 2, gpt-oss)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        return by_rows(lambda x: (self.weight * normalized(x, self.eps)).to(x.dtype), x)


class OffsetRMSNorm(RMSNorm):
    """``y = (1 + w) * x / sqrt(mean(x^2) + eps)``, rounded at the end; ``w`` begins at zero (Gemma)."""

    def reset_parameters(self) -> None:
        """Weight zero."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same shape and dtype."""
        return by_rows(lambda x: (normalized(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype), x)


def normalized(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, in fp32."""
    x_32 = x.float()
    return x_32 * torch.rsqrt(x_32.pow(2).mean(-1, keepdim=True) + eps)
