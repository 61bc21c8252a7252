"""The two factors of an adapter, and a module that owns some."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_peft.config import LoRAConfig
from tt_peft.nf4 import dense

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_EXACT_SVD = 2048  # above this size of the smaller side, a randomised SVD: an exact one takes minutes


@dataclass(frozen=True)
class LowRankSpec:
    """The numbers of one adapter on one layer."""

    rank: int
    alpha: float
    scaling: float
    config: LoRAConfig


def spec_of(name: str, config: LoRAConfig) -> LowRankSpec:
    """Rank and scaling of the module ``name``."""
    rank = config.ranks.get(name, config.rank)
    alpha = config.alphas.get(name, config.alpha)
    return LowRankSpec(rank=rank, alpha=alpha, scaling=config.scaling(rank, alpha), config=config)


class LowRank(nn.Module):
    """The two factors of one adapter on one weight: its change is ``scaling * B @ A``.

    ``lora_A`` is [rank, in] and ``lora_B`` [out, rank]; an embedding has [rank, vocab] and [dim, rank]; stacked experts
    have [experts, rank, in] and [experts, out, rank]. DoRA adds ``lora_magnitude_vector`` [out]. PiSSA adds the factors
    that it started from: their product is subtracted from the base weight, which itself does not change.
    """

    lora_magnitude_vector: nn.Parameter | None
    start_A: nn.Parameter | None  # noqa: N815
    start_B: nn.Parameter | None  # noqa: N815

    def __init__(self, spec: LowRankSpec, shape_A: tuple[int, ...], shape_B: tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        options: dict[str, Any] = {"device": like.device, "dtype": spec.config.dtype or like.dtype}
        self.lora_A = nn.Parameter(torch.empty(shape_A, **options))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **options))
        dora, pissa = spec.config.use_dora, spec.config.init == "pissa"
        self.lora_magnitude_vector = nn.Parameter(torch.empty(shape_B[0], **options)) if dora else None
        self.start_A = nn.Parameter(torch.empty(shape_A, **options), requires_grad=False) if pissa else None
        self.start_B = nn.Parameter(torch.empty(shape_B, **options), requires_grad=False) if pissa else None
        self.started = False  # whether the values were set

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """``(A, B)``; with a start point ``([A; A0], [B, -B0])``."""
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if self.start_A is not None and self.start_B is not None:
            A, B = torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)
        return (A, B) if dtype is None else (A.to(dtype), B.to(dtype))

    @property
    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.training and self.spec.config.dropout > 0

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.spec.config.dropout, self.training)

    def forward(self, x: Tensor, *, dropped: Tensor | None = None) -> Tensor:
        """``scaling * B A dropout(x)`` for a linear layer, less what it started from, which x reaches whole."""
        dropped = self.drop(x) if dropped is None else dropped
        if self.drops and self.start_A is not None and self.start_B is not None:
            change = self._product(dropped, self.lora_A, self.lora_B)
            return change - self._product(x, self.start_A, self.start_B)
        return self._product(dropped, *self.factors())

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)) * self.spec.scaling, B.to(x.dtype))

    def delta(self) -> Tensor:
        """The change of the weight in fp32, [out, in] or [experts, out, in]."""
        A, B = self.factors(torch.float32)
        return (B @ A) * self.spec.scaling

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The usual start: A uniform as torch's linear layers have it, B zero."""
        assign_(self.lora_A, uniform(self.lora_A.shape, 1.0 / math.sqrt(self.lora_A.shape[-1])))
        assign_(self.lora_B, torch.zeros(self.lora_B.shape))

    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, alpha={self.spec.alpha}, dropout={self.spec.config.dropout}"


class AdapterModule(nn.Module):
    """A module that owns adapters, by name; some are active."""

    adapters: nn.ModuleDict
    active: tuple[str, ...]
    disabled: bool

    def become_adapted_(self) -> None:
        """Give a module whose class was just changed the fields of this class."""
        self.adapters = nn.ModuleDict()
        self.active = ()
        self.disabled = False

    def adapter_params(self) -> list[str]:
        """Local names of the parameters that are not base weights."""
        return [f"adapters.{name}" for name, _ in self.adapters.named_parameters()]

    def active_adapters(self) -> list[Any]:
        return [] if self.disabled else [self.adapters[name] for name in self.active]


class MixedModule(AdapterModule):
    """An adapter module of any other class: ``class LoRAExperts(StackedLoRA, Experts)``, made at run time."""

    prefix = ""  # of the name of the class

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """By the class that it was made from: pickle cannot find a class that is made at run time."""
        mixin, cls = type(self).__bases__
        return _blank, (mixin, cls), self.__dict__


_CLASSES: dict[tuple[type[MixedModule], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(mixin: type[MixedModule], cls: type[nn.Module]) -> type[nn.Module]:
    """The class ``cls`` with ``mixin`` before it, always the same one."""
    if (mixin, cls) not in _CLASSES:
        fields = {"__module__": cls.__module__}
        _CLASSES[mixin, cls] = type(f"{mixin.prefix}{cls.__name__}", (mixin, cls), fields)
    return _CLASSES[mixin, cls]


def _blank(mixin: type[MixedModule], cls: type[nn.Module]) -> nn.Module:
    made = mixed_class(mixin, cls)
    return made.__new__(made)


def low_ranks(module: AdapterModule, adapter: str) -> dict[str, LowRank]:
    """The factors of one adapter on a module, by local name: one, or one for each stacked weight."""
    if adapter not in module.adapters:
        return {}
    return {name: m for name, m in module.adapters[adapter].named_modules() if isinstance(m, LowRank)}


@torch.no_grad()
def row_norms(weight: Tensor, adapter: LowRank) -> Tensor:
    """The norm of each row of ``W + s B A``, [out] in fp32, without forming that matrix.

    ``|w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b`` for a row w of W and b of B.
    """
    A, B = (whole(factor) for factor in adapter.factors(torch.float32))
    s = adapter.spec.scaling
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=accumulate) ** 2
    cross = ((weight @ A.T.to(weight.dtype)).float() * B).sum(dim=1)
    own = ((B @ (A @ A.T)) * B).sum(dim=1)
    norms = (squares + 2 * s * cross + s * s * own).clamp(min=0).sqrt()
    clamped: Tensor = norms.clamp(min=torch.finfo(torch.float32).tiny)
    return clamped


@torch.no_grad()
def principal_factors(matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``(A, B)`` in fp32 such that ``scaling * B A`` is the best approximation of ``matrix`` of that rank."""
    matrix = matrix.float()
    if min(matrix.shape) <= _EXACT_SVD:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, q=min(2 * rank + 8, min(matrix.shape)), niter=8)
        Vh = V.T
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@torch.no_grad()
def start_from_loss_(adapter: LowRank, weight: Tensor, quantized: Tensor) -> None:
    """LoftQ's first step: the factors make up for what quantization took from ``weight``.

    The base stays the NF4 of ``weight``, so that the adapter fits any copy of it: https://arxiv.org/abs/2310.08659
    """
    if adapter.lora_A.is_meta:
        adapter.to_empty(device=weight.device)
    kept = dense(quantized)
    A, B = principal_factors(weight.float() - kept.float(), adapter.spec.rank, adapter.spec.scaling)
    assign_(adapter.lora_A, A)
    assign_(adapter.lora_B, B)
    if adapter.lora_magnitude_vector is not None:
        assign_(adapter.lora_magnitude_vector, row_norms(kept, adapter))
    adapter.started = True


@torch.no_grad()
def assign_(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter that may be sharded; then rank 0's value counts."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor; there are none before ``torch.distributed.tensor`` is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every rank must call); any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def uniform(shape: Sequence[int], bound: float) -> Tensor:
    """In fp32 on the CPU whatever the model's device and dtype, so that a seed means the same values everywhere."""
    return torch.empty(tuple(shape), device="cpu", dtype=torch.float32).uniform_(-bound, bound)


def normal(shape: Sequence[int], std: float) -> Tensor:
    """As ``uniform``."""
    return torch.empty(tuple(shape), device="cpu", dtype=torch.float32).normal_(0.0, std)
