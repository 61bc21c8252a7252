"""Weight-decomposed low-rank adaptation: https://arxiv.org/abs/2402.09353."""

from torch import Tensor

from tt_peft.lora import LoRALinear, QLoRALinear
from tt_peft.lowrank import LowRank, row_norms
from tt_peft.nf4 import dense, frozen_linear


class DoRALinear(LoRALinear):
    """``y = m / n * (W + scaling * B A) x + b`` with n the norm of each row of ``W + scaling * B A``.

    As in the paper's section 4.3, n counts as a constant in the backward. Dropout is on x in all that the adapter
    adds: ``(m / n - 1) W x + m / n * scaling * B A x``. Adapters without DoRA on the same layer add up as in LoRA.
    """

    dora = True

    def effective_weight(self) -> Tensor:
        """W with the active adapters added, differentiable."""
        base = dense(self.weight)
        weight = base
        for adapter in self.active_adapters():
            delta = adapter.delta().to(base.dtype)
            if adapter.lora_magnitude_vector is not None:
                ratio = magnitude_ratio(base, adapter).to(base.dtype)[:, None]
                delta = (ratio - 1) * base + ratio * delta
            weight = weight + delta
        return weight

    def forward(self, x: Tensor) -> Tensor:
        base = frozen_linear(x, self.weight)
        y = base if self.bias is None else base + self.bias
        for adapter in self.active_adapters():
            dropped = adapter.drop(x)
            change = adapter(x, dropped=dropped)
            if adapter.lora_magnitude_vector is not None:
                ratio = magnitude_ratio(dense(self.weight, reuse=True), adapter).to(x.dtype)
                again = frozen_linear(dropped, self.weight) if adapter.drops else base
                change = (ratio - 1) * again + ratio * change
            y = y + change
        return y


class QDoRALinear(QLoRALinear, DoRALinear):
    """DoRA on an NF4 weight."""


def magnitude_ratio(weight: Tensor, adapter: LowRank) -> Tensor:
    """``m / n``, [out] in fp32; the gradient goes to m only."""
    assert adapter.lora_magnitude_vector is not None
    return adapter.lora_magnitude_vector.float() / row_norms(weight, adapter)
