"""Sampling: from logits to a token, and the checks of its settings, seed and end ids. B: batch, V: vocabulary."""

import hashlib
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from tt_models.shown import shown

EndIds = int | Collection[int] | Tensor | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; applied in the order of the fields, the penalty first."""

    repetition_penalty: float = 1.0  # above 1: tokens already seen become less likely, https://arxiv.org/abs/1909.05858
    temperature: float = 1.0  # 0: the most probable token
    top_k: int | None = None  # only this many tokens, the most probable ones
    top_p: float | None = None  # only the most probable ones that together reach it, https://arxiv.org/abs/1904.09751
    min_p: float | None = None  # only those above this share of the best one, https://arxiv.org/abs/2407.01082

    def __post_init__(self) -> None:
        if not is_number(self.repetition_penalty) or not 1e-3 <= self.repetition_penalty <= 1e3:
            found = shown(self.repetition_penalty)
            raise ValueError(f"repetition_penalty must be positive, from 0.001 to 1000 (1: none), got {found}")
        if not is_number(self.temperature) or not (self.temperature == 0 or 1e-5 <= self.temperature <= 1e5):
            found = shown(self.temperature)
            raise ValueError(f"temperature must not be negative: 0 (the likeliest token) or 1e-5 to 1e5, got {found}")
        if self.top_k is not None and (not is_whole_number(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {shown(self.top_k)}")
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], or None for all tokens, got {shown(self.top_p)}")
        if self.min_p is not None and (not is_number(self.min_p) or not 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be in [0, 1], or None for all tokens, got {shown(self.min_p)}")


def is_whole_number(value: object) -> bool:
    """An int, of numpy too, but not a bool."""
    return hasattr(value, "__index__") and not isinstance(value, bool | torch.Tensor)


def is_number(value: object) -> bool:
    """An int or float, of numpy too, but not a bool."""
    return is_whole_number(value) or isinstance(value, float) or type(value).__module__ == "numpy"


def is_token_id(value: Any) -> bool:
    """Whether it is a whole number (of numpy or torch too) that fits into a tensor."""
    try:
        return not isinstance(value, bool) and -(2**63) <= operator.index(value) < 2**63
    except TypeError:
        return False


def check_seed(seed: Any) -> None:
    """ValueError for a seed that torch does not accept."""
    if seed is not None and (not is_whole_number(seed) or not 0 <= seed < 2**64):
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, or None, got {shown(seed)}")


def row_seed(seed: int, *numbers: int) -> int:
    """A seed for the row, or the sample of a row, with these numbers: no two share their draws, as seed + 1 would."""
    words = " ".join(map(str, (operator.index(seed), *numbers)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8])


class Draws:
    """Numbers in [0, 1), one per row and step. A seeded row draws the same ones in whatever batch it is.

    ``seed``: one for all ``rows``, which then draw with ``row_seed(seed, row)``; one per row; or None for torch's
    global generator.
    """

    def __init__(self, seed: int | Sequence[int] | None, rows: int) -> None:
        several = isinstance(seed, Sequence) and not isinstance(seed, str)
        for one in seed if several else [seed]:  # type: ignore[union-attr]
            check_seed(one)
        if several and (len(seed) != rows or None in seed):  # type: ignore[arg-type, operator]
            raise ValueError(f"seed must be one number or one per row, got {shown(seed)} for {rows} rows")
        self.generators: list[Random] | None = None
        if seed is not None:
            seeds: Any = seed if several else [row_seed(seed, row) for row in range(rows)]  # type: ignore[arg-type]
            self.generators = [Random(operator.index(one)) for one in seeds]  # noqa: S311

    def next(self, rows: Sequence[int]) -> Tensor:
        """float64[len(rows)], on the CPU."""
        if self.generators is None:
            return torch.rand(len(rows), dtype=torch.float64)
        return torch.tensor([self.generators[row].random() for row in rows], dtype=torch.float64)


def numbers_of(eos_ids: EndIds, vocab_size: int) -> list[int]:
    """One id or several, None for none, as plain numbers; ValueError for an id that the model does not have."""
    if eos_ids is None:
        return []
    ids: Any = eos_ids
    several = ids.dim() > 0 if isinstance(ids, Tensor) else isinstance(ids, Collection) and not isinstance(ids, str)
    given: list[Any] = [*ids] if several else [ids]
    wrong = [one for one in given if not is_token_id(one) or not 0 <= operator.index(one) < vocab_size]
    if wrong:
        ids = f"whose ids are 0 to {vocab_size - 1}"
        raise ValueError(f"eos_ids: {shown(wrong[0])} is not a token of the model, {ids}; leave it out")
    return [operator.index(one) for one in given]


def sample(
    logits_BV: Tensor, sampling: Sampling, *, uniform_B: Tensor | None = None, seen_BV: Tensor | None = None
) -> Tensor:
    """A token per row, int64[B]; ``seen_BV`` marks the tokens that ``repetition_penalty`` acts on.

    ``uniform_B``: numbers in [0, 1), each of which chooses the token of its row (default: from torch's global
    generator).
    ValueError if logits are not finite: the largest of nan is a token like any other, and its text looks like one.
    """
    if sampling.repetition_penalty != 1.0 and seen_BV is not None:
        logits_BV = penalize(logits_BV.float(), seen_BV, sampling.repetition_penalty)
    best_B = logits_BV.max(dim=-1)  # nan if any is nan
    if not bool(best_B.values.isfinite().all()):
        raise ValueError(
            "logits are not finite, no token can be drawn: the weights contain nan or inf, or overflow in this dtype "
            "(fp16 does above 65504: use bf16 or fp32)"
        )
    if sampling.temperature == 0:
        return best_B.indices
    if uniform_B is None:
        uniform_B = torch.rand(logits_BV.shape[0], dtype=torch.float64)
    return draw(filtered(logits_BV, sampling), uniform_B)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the sum of the probabilities, in the order of the ids, exceeds ``uniform_B``; int64[B].

    One number per row instead of one per token of the vocabulary, as torch.multinomial takes; a row's token depends on
    its own logits and number alone.
    """
    device = logits_BV.device
    if device.type == "mps":  # without fp64
        logits_BV = logits_BV.cpu()
    sums_BV = logits_BV.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    at_B1 = uniform_B.to(sums_BV.device)[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, at_B1, right=True)[:, 0].to(device)  # right: a sum that does not grow is passed


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Move the logits of tokens already seen down, by division above zero and by multiplication below."""
    return torch.where(seen_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits in fp32 over the temperature; minus infinity for every token that must not be drawn."""
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits_BV = keep_nucleus(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        probabilities = logits_BV.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(probabilities < least, -torch.inf)
    return logits_BV


def keep_nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Only the most probable tokens that together reach ``top_p``, at least one."""
    ordered, index = logits_BV.sort(dim=-1, descending=True)
    exact = torch.float32 if logits_BV.device.type == "mps" else torch.float64  # fp32 loses the tail of a vocabulary
    probabilities = ordered.softmax(dim=-1, dtype=exact)
    ahead = probabilities.cumsum(dim=-1) - probabilities  # of the tokens more probable than this one
    ordered = ordered.masked_fill(ahead >= top_p, -torch.inf)
    return torch.empty_like(logits_BV).scatter_(-1, index, ordered)


def seen_tokens(input_ids_BS: Tensor, lengths_B: Tensor | None, vocab_size: int) -> Tensor:
    """bool[B, V]: which tokens each prompt contains, padding excluded."""
    batch, seq_len = input_ids_BS.shape
    real = torch.ones_like(input_ids_BS, dtype=torch.int8)
    if lengths_B is not None:
        columns = torch.arange(seq_len, device=input_ids_BS.device)
        real = (columns >= seq_len - lengths_B[:, None]).to(torch.int8)
    counts = torch.zeros(batch, vocab_size, dtype=torch.int8, device=input_ids_BS.device)
    return counts.scatter_reduce(1, input_ids_BS, real, "amax").bool()
