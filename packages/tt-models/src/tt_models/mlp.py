"""The gated feed-forward block: https://arxiv.org/abs/2002.05202."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_models.linear import linear
from tt_models.rows import gradients_with_graph, in_blocks, row_blocks

BLOCK = 2**17  # elements of a block, as in tt_models.rows
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """``y = down(act(gate x) * up x)``."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape."""
        gate, up = linear(self.gate_proj, x), linear(self.up_proj, x)
        return linear(self.down_proj, gated(self.activation, gate, up))


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """``act(gate) * up``."""
    if gate.numel() <= BLOCK or not in_blocks(gate, up):
        return activation(gate) * up
    y: Tensor = GatedActivation.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y


class GatedActivation(torch.autograd.Function):
    """``act(gate) * up``, both ways in blocks of rows; ``act(gate)`` is made again in backward instead of being kept.

    The same bits as automatic differentiation gives.
    """

    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The shape of both."""
        y = torch.empty_like(up)
        for g, u, out in row_blocks(gate, up, y, size=BLOCK):
            torch.mul(activation(g), u, out=out)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what backward needs."""
        ctx.save_for_backward(*inputs[:2])
        ctx.activation = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of gate and up."""
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_with_graph(lambda gate, up: ctx.activation(gate) * up, (gate, up), grad), None
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, dy, dg, du in row_blocks(gate, up, grad.contiguous(), grad_gate, grad_up, size=BLOCK):
            with torch.enable_grad():
                leaf = g.detach().requires_grad_()
                active = ctx.activation(leaf)
            torch.mul(dy, active.detach(), out=du)
            dg.copy_(torch.autograd.grad(active, leaf, dy * u)[0])
        return grad_gate, grad_up, None
