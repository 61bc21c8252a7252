"""Root mean square normalization, computed in fp32: https://arxiv.org/abs/1910.07467."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``y = w * x / sqrt(mean(x^2) + eps)``: fp32 inside, rounded to the dtype of ``x`` before the weight."""

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
        x_32 = x.float()
        return self.weight * (x_32 * torch.rsqrt(x_32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.numel()}, eps={self.eps}"
