"""Objectives: each takes a model and a micro-batch and returns *sums*; the step divides them once.

Shapes: B batch, S sequence, N positions (flattened), D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tt_peft import NF4Linear
from tt_peft.full_modules import SavedModule
from tt_peft.lowrank import AdapterModule

T = TypeVar("T")

Batch = dict[str, Tensor]  # input_ids, labels and, if documents share rows, position_ids; each [B, S]


class CausalLM(Protocol):
    """What an objective may ask of a model. Every ``tt_models.Decoder`` is one, with and without an adapter."""

    @property
    def lm_head(self) -> nn.Module | None:
        """The output projection; None if it is the embeddings."""

    @property
    def logit_softcap(self) -> float | None:
        """``c`` of the logits' ``c * tanh(logit / c)``, if they are bounded."""

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: the output projection."""

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[B, S, D] after the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As in ``nn.Module``."""


class Summed(NamedTuple):
    """Sums over a micro-batch. The step adds them up and divides by the sum of ``count``.

    loss: a differentiable scalar. count: the number of items that it sums, such as trained tokens or pairs of answers.
    tokens: trained tokens, which the speed and ``tokens`` of metrics.jsonl count. metrics: further sums by name; their
    means are figures of the step, in metrics.jsonl, on the console and in the report.
    """

    loss: Tensor
    count: int  # type: ignore[assignment]  # a tuple's method, which nobody needs here
    tokens: int
    metrics: Mapping[str, Tensor] = MappingProxyType({})


Objective = Callable[[CausalLM, Batch], Summed]
IGNORE = -100
CHUNK_BYTES = 64 * 2**20  # of fp32 logits alive at a time
WAITING_BYTES = 128 * 2**20  # of bf16 gradients by logits that wait for one product
PRODUCTS_IN_LOW_PRECISION = 4  # parts of a bf16 gradient that are added up before their sum is added up in fp32


def cross_entropy(model: CausalLM, batch: Batch, *, label_smoothing: float = 0.0) -> Summed:
    """Next-token cross entropy, summed over the trained tokens in fp32.

    Position t predicts ``labels[:, t + 1]``; -100 means no loss.
    """
    hidden_BSD = model.hidden_states(batch["input_ids"], position_ids=batch.get("position_ids"))
    targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    keep = targets_BS != IGNORE
    hidden_ND, targets_N = hidden_BSD[keep], targets_BS[keep]
    count, weight = targets_N.numel(), output_projection(model)
    options: dict[str, Any] = {"reduction": "sum", "label_smoothing": label_smoothing}
    if weight is None:
        parts = by_chunks(
            lambda logits, targets: F.cross_entropy(logits, targets, **options), model, hidden_ND, targets_N
        )
        loss = torch.stack(parts).sum()
    else:
        loss = linear_cross_entropy(hidden_ND, weight, targets_N, softcap=model.logit_softcap, **options)
    return Summed(loss, count, tokens=count)


def output_projection(model: CausalLM) -> Tensor | None:
    """[V, D], by which hidden states are multiplied; None if the head is more than a matrix: low-rank factors, NF4.

    The factors are not added to the weight, whose dtype would lose small changes, and their dropout stays.
    """
    if isinstance(model.lm_head, SavedModule):
        return model.lm_head.effective_weight()
    return None if isinstance(model.lm_head, AdapterModule | NF4Linear) else model.output_weight


def by_chunks(formula: Callable[[Tensor, Tensor], T], model: CausalLM, hidden_ND: Tensor, labels_N: Tensor) -> list[T]:
    """``formula(logits [C, V] in fp32, labels [C])`` of each chunk of positions, for a head that is not one matrix.

    The logits of a chunk are computed again in the backward pass, with the same dropout.
    """
    softcap, size = model.logit_softcap, chunk_of(model.output_weight)

    def of_chunk(hidden_CD: Tensor, labels_C: Tensor) -> T:
        assert model.lm_head is not None
        logits_CV = model.lm_head(hidden_CD).float()
        return formula(softcap * torch.tanh(logits_CV / softcap) if softcap else logits_CV, labels_C)

    chunks = zip(hidden_ND.split(size), labels_N.split(size), strict=True)  # type: ignore[no-untyped-call]
    return [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]


def chunk_of(weight: Tensor) -> int:
    """Positions whose fp32 logits are alive at a time."""
    return max(16, CHUNK_BYTES // (4 * weight.shape[0]))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T, labels)`` in fp32 without ever holding all logits.

    The gradients are computed in the forward, a chunk of positions at a time, so that nothing but them is kept; ignored
    positions cost nothing, and a frozen weight gets no gradient work.

    Args:
        hidden: [..., D]; weight: [V, D]; labels: [...] the target of each position (not shifted), -100 to ignore.
        reduction: ``mean`` over the positions not ignored (nan if there are none, as in torch), or ``sum``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` first.
        chunk_size: positions at a time; by default what keeps the fp32 logits of a chunk under 64 MB.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    hidden_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep = labels_N != IGNORE
    if not bool(keep.all()):
        hidden_ND, labels_N = hidden_ND[keep], labels_N[keep]
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *differentiable(hidden_ND, weight), labels_N, label_smoothing, softcap, chunk_size or chunk_of(weight)
    )
    return total if reduction == "sum" else total / labels_N.numel()


def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, detached if no gradient is wanted: ``ctx.needs_input_grad`` is true under ``no_grad`` as well."""
    return tensors if torch.is_grad_enabled() else tuple(tensor.detach() for tensor in tensors)


class WeightGradient:
    """The sum over chunks of ``grad.T @ hidden``.

    A product of bf16 factors is rounded once, and those of a long sequence would be lost in a bf16 sum that grows. So
    chunks wait until a product of many positions pays, and every few products the sum is added up in fp32.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.few_VD = torch.zeros_like(weight_VD)
        self.many_VD: Tensor | None = None
        self.products = 0
        low = weight_VD.dtype.itemsize < 4
        self.most = WAITING_BYTES // (weight_VD.dtype.itemsize * weight_VD.shape[0]) if low else 0  # positions
        self.buffer_RV: Tensor | None = None
        self.hidden: list[Tensor] = []
        self.filled = 0

    def of_chunk(self, grad_CV: Tensor, hidden_CD: Tensor) -> Tensor:
        """``grad_CV`` (fp32) in the dtype of the weight; its product with ``hidden_CD`` will be in ``total``."""
        rows = len(grad_CV)
        if rows > self.most:  # nothing waits
            narrow_CV = grad_CV.to(self.few_VD.dtype)
            self._multiply(narrow_CV, hidden_CD)
            return narrow_CV
        self.make_room(rows)
        if self.buffer_RV is None:
            self.buffer_RV = self.few_VD.new_empty(self.most, grad_CV.shape[1])
        part_CV = self.buffer_RV[self.filled : self.filled + rows]
        part_CV.copy_(grad_CV)
        self.hidden.append(hidden_CD)
        self.filled += rows
        return part_CV

    def make_room(self, rows: int) -> None:
        """Multiply what waits, unless ``rows`` more positions can wait with it."""
        if self.filled + rows > self.most:
            self._flush()

    def _flush(self) -> None:
        if self.filled:
            assert self.buffer_RV is not None
            self._multiply(self.buffer_RV[: self.filled], torch.cat(self.hidden))
            self.hidden, self.filled = [], 0

    def _multiply(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.products == PRODUCTS_IN_LOW_PRECISION and self.few_VD.dtype.itemsize < 4:
            self.many_VD, self.products = self._sum().float(), 0
            self.few_VD.zero_()
        self.few_VD.addmm_(grad_CV.T, hidden_CD)
        self.products += 1

    def _sum(self) -> Tensor:
        return self.few_VD if self.many_VD is None else self.many_VD.add_(self.few_VD)

    def total(self) -> Tensor:
        self._flush()
        self.buffer_RV = None
        return self._sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over positions; its gradients stand ready when forward ends and are only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        smoothing: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = WeightGradient(weight_VD) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden_ND[part], weight_VD).float()
            loss, grad_CV = _loss_and_gradient_(
                logits_CV, labels_N[part], smoothing, softcap, needs_hidden or needs_weight
            )
            total += loss
            if grad_CV is None:
                continue
            if grad_weight is None:
                grad_CV = grad_CV.to(weight_VD.dtype)
            else:
                grad_CV = grad_weight.of_chunk(grad_CV, hidden_ND[part])
            del logits_CV  # before the products, which take memory of their own
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
            del grad_CV
            if grad_weight is not None:
                grad_weight.make_room(chunk)
        ctx.gradients = grad_hidden_ND, None if grad_weight is None else grad_weight.total()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: one backward pass only, since its gradients are used up by it")
        gradients, ctx.gradients = ctx.gradients, None  # given away: nobody copies them
        scaled = [None if kept is None else kept.mul_(grad.to(kept.dtype)) for kept in gradients]
        return scaled[0], scaled[1], None, None, None, None


def _loss_and_gradient_(
    logits_CV: Tensor, labels_C: Tensor, smoothing: float, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss, and its gradient by the logits, which is written over them."""
    if softcap:
        logits_CV.div_(softcap).tanh_()
        slope_CV = 1 - logits_CV.square() if needs_gradient else None
        logits_CV.mul_(softcap)
    log_z_C = log_sum(logits_CV)
    picked_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    loss = (log_z_C - (1 - smoothing) * picked_C).sum()
    if smoothing:
        loss = loss - smoothing * logits_CV.mean(dim=-1).sum()
    if not needs_gradient:
        return loss, None
    grad_CV = logits_CV.sub_(log_z_C[:, None]).exp_()
    if smoothing:
        grad_CV.sub_(smoothing / logits_CV.shape[1])
    grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(picked_C, smoothing - 1)[:, None])
    return loss, grad_CV.mul_(slope_CV) if softcap and slope_CV is not None else grad_CV


def log_sum(logits_CV: Tensor) -> Tensor:
    """``logsumexp`` of each row, [C], with an eighth of the memory beside them that torch takes."""
    parts = logits_CV.split(max(1, -(-len(logits_CV) // 8)))  # type: ignore[no-untyped-call]
    return torch.cat([torch.logsumexp(part, dim=-1) for part in parts])
