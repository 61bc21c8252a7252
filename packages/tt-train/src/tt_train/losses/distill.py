"""Knowledge distillation: the student's distribution over the next token follows a teacher's.

https://arxiv.org/abs/1503.02531. Neither the student's nor the teacher's logits are ever held for all positions.
Shapes: N trained positions, C positions of a chunk, R of a block of its rows, D hidden size, V vocabulary that both
know.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tt_train.losses.chunks import WeightGradient, by_rows_, cap_, chunk_of, chunks, differentiable, multiply_
from tt_train.losses.cross_entropy import IGNORE, Batch, CausalLM, Summed, output_projection


def distillation(
    model: CausalLM,
    batch: Batch,
    *,
    teacher: CausalLM,
    divergence: str = "forward",
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.5,
) -> Summed:
    """``(1 - w) T^2 KL + w CE`` summed over the trained tokens in fp32, w being ``cross_entropy_weight``.

    KL is that of the distributions at temperature T over the tokens that both models have: ``forward`` is
    ``KL(teacher || student)``, which covers all that the teacher may say, ``reverse`` is ``KL(student || teacher)``,
    which prefers what it says most. T^2 keeps the size of the gradients. CE is the plain next-token cross entropy.

    The metrics ``divergence`` (without T^2) and ``cross_entropy`` are means over the trained tokens.
    """
    targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    keep = targets_BS != IGNORE
    inputs = {"position_ids": batch.get("position_ids"), "keep": keep}
    with torch.no_grad():
        teacher_ND = teacher.hidden_states(batch["input_ids"], **inputs)
    hidden_ND, targets_N = model.hidden_states(batch["input_ids"], **inputs), targets_BS[keep]
    formula = _Formula(model, teacher, divergence, temperature, cross_entropy_weight)
    weight = output_projection(model)
    if weight is None:  # low-rank factors or NF4 on the head
        loss, kl, ce = formula.by_autograd(hidden_ND, teacher_ND, targets_N)
    else:
        loss, kl, ce = _LinearDistillation.apply(  # type: ignore[no-untyped-call]
            *differentiable(hidden_ND, weight), teacher_ND, targets_N, formula
        )
    count = targets_N.numel()
    return Summed(loss, count, tokens=count, metrics={"divergence": kl.detach(), "cross_entropy": ce.detach()})


class _Formula:
    """The loss of a chunk, and its gradient by the student's logits."""

    def __init__(
        self, student: CausalLM, teacher: CausalLM, divergence: str, temperature: float, weight: float
    ) -> None:
        self.student, self.teacher, self.weight_of_ce = student, teacher, weight
        self.reverse, self.temperature = divergence == "reverse", temperature
        # embeddings may be padded to different sizes; both vocabularies are the tokenizer's
        self.known = min(student.output_weight.shape[0], teacher.output_weight.shape[0])
        self.chunk = max(8, min(chunk_of(student.output_weight), chunk_of(teacher.output_weight)) // 2)

    def log_teacher(self, logits_CV: Tensor) -> Tensor:
        """log p of the teacher, [C, V] in fp32."""
        return F.log_softmax(logits_CV.float()[:, : self.known] / self.temperature, dim=-1)

    def terms(self, logits_CV: Tensor, log_teacher_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, KL, CE), sums over the chunk, from the student's logits in fp32."""
        log_student_CV = F.log_softmax(logits_CV[:, : self.known] / self.temperature, dim=-1)
        first, second = log_teacher_CV, log_student_CV
        if self.reverse:
            first, second = second, first
        kl = (first.exp() * (first - second)).sum()
        ce = F.cross_entropy(logits_CV, targets_C, reduction="sum")
        return self.total(kl, ce), kl, ce

    def total(self, kl: Tensor, ce: Tensor) -> Tensor:
        return (1 - self.weight_of_ce) * self.temperature**2 * kl + self.weight_of_ce * ce

    def gradient(self, logits_CV: Tensor, log_teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
        """That of ``terms``' loss by the logits, [C, V]."""
        grad_CV = logits_CV.softmax(dim=-1).mul_(self.weight_of_ce)
        ones = torch.full_like(targets_C[:, None], -self.weight_of_ce, dtype=grad_CV.dtype)
        grad_CV.scatter_add_(1, targets_C[:, None], ones)
        log_student_CV = F.log_softmax(logits_CV[:, : self.known] / self.temperature, dim=-1)
        if self.reverse:
            ratio_CV = log_student_CV - log_teacher_CV
            student_CV = log_student_CV.exp_()
            mean_C1 = (student_CV * ratio_CV).sum(dim=-1, keepdim=True)
            by_kl_CV = ratio_CV.sub_(mean_C1).mul_(student_CV)
        else:
            by_kl_CV = log_student_CV.exp_().sub_(log_teacher_CV.exp())
        grad_CV[:, : self.known] += by_kl_CV.mul_((1 - self.weight_of_ce) * self.temperature)
        return grad_CV

    def rows(
        self, logits_RV: Tensor, teacher_RV: Tensor, targets_R: Tensor, *, sums: Tensor, needs_gradient: bool
    ) -> Tensor | None:
        """Add ``terms`` to ``sums``; returns the gradient by the logits, if it is needed."""
        slope_RV = cap_(logits_RV, self.student.logit_softcap, slope=needs_gradient)
        log_teacher_RV = self.log_teacher(teacher_RV)
        sums += torch.stack(self.terms(logits_RV, log_teacher_RV, targets_R))
        if not needs_gradient:
            return None
        grad_RV = self.gradient(logits_RV, log_teacher_RV, targets_R)
        return grad_RV if slope_RV is None else grad_RV.mul_(slope_RV)

    def by_autograd(self, hidden_ND: Tensor, teacher_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``terms`` of all chunks, whose logits are computed again in the backward pass."""

        def of_chunk(hidden_CD: Tensor, teacher_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                log_teacher_CV = self.log_teacher(self.teacher.logits(teacher_CD))
            return self.terms(self.student.logits(hidden_CD).float(), log_teacher_CV, targets_C)

        rows = (torch.split(each, self.chunk) for each in (hidden_ND, teacher_ND, targets_N))
        parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in zip(*rows, strict=True)]
        loss, kl, ce = (torch.stack(each).sum() for each in zip(*parts, strict=True))
        return loss, kl, ce


class _LinearDistillation(torch.autograd.Function):
    """The sums over positions; the gradients are computed in the forward pass, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, teacher_ND: Tensor, targets_N: Tensor, formula: _Formula
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = WeightGradient(weight_VD) if needs_weight else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)
        of_rows = partial(formula.rows, sums=sums, needs_gradient=needs_hidden or needs_weight)
        for part, logits_CV in chunks(hidden_ND, weight_VD, trains=needs_weight):
            by_rows_(of_rows, logits_CV, formula.teacher.logits(teacher_ND[part]), targets_N[part])
            if grad_hidden_ND is not None:
                multiply_(grad_hidden_ND[part], logits_CV, weight_VD)
            if grad_weight is not None:
                grad_weight.add(logits_CV, hidden_ND[part])
        ctx.gradients = grad_hidden_ND, None if grad_weight is None else grad_weight.total()
        loss, kl, ce = sums.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return loss.clone(), kl, ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("distillation: one backward pass only, since its gradients are used up by it")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if kept is None else kept.mul_(grad.to(kept.dtype)) for kept in gradients]
        return scaled[0], scaled[1], None, None, None
