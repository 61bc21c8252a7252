"""The gated feed-forward block: https://arxiv.org/abs/2002.05202."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.cpu.elementwise import gated
from tt_models.cpu.products import linear, linears

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; ValueError that lists the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """``y = down(act(gate x) * up x)``."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation_named(activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape."""
        gate, up = linears((self.gate_proj, self.up_proj), x)
        return linear(self.down_proj, gated(self.activation, gate, up))
