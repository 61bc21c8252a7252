"""What a model answers to held-out questions, and how two models differ."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tt_models
from tt_cli.quickstart.tasks import Row

MAX_NEW_TOKENS = 16
BATCH = 100


def answers(model: tt_models.Decoder, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """The greedy answer to each question; one that does not end in time is marked by a trailing ellipsis."""
    found: list[str] = []
    ends = set(tokenizer.eos_ids)
    for prompts, lengths in _padded_prompts(tokenizer, questions):
        output = tt_models.generate(
            model,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            prompt_lengths=lengths,
        )
        for ids in output[:, prompts.shape[1] :].tolist():
            stop = next((place for place, token in enumerate(ids) if token in ends), None)
            found.append(tokenizer.decode(ids[:stop]) + ("..." if stop is None else ""))
    return found


def exact_match(rows: Sequence[Row], given: Sequence[str]) -> float:
    """The share of rows whose answer was given letter by letter."""
    return sum(row.answer == answer for row, answer in zip(rows, given, strict=True)) / len(rows)


def by_kind(rows: Sequence[Row], given: Sequence[str]) -> dict[str, float]:
    """``exact_match`` of each kind of task."""
    kinds = dict.fromkeys(row.kind for row in rows)
    pairs = list(zip(rows, given, strict=True))
    return {
        kind: exact_match([row for row, _ in pairs if row.kind == kind], [a for row, a in pairs if row.kind == kind])
        for kind in kinds
    }


@torch.no_grad()
def largest_difference(
    one: tt_models.Decoder, other: tt_models.Decoder, tokenizer: Any, questions: Sequence[str]
) -> float:
    """The largest difference of two models' logits on the questions, relative to the largest logit."""
    worst = 0.0
    for question in questions:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        expected, found = one(ids), other(ids)
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    return worst


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """One question up to where the model answers."""
    ids: list[int] = tokenizer.encode_prompt([{"role": "user", "content": question}])
    return ids


def _padded_prompts(tokenizer: Any, questions: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of prompts padded on the left, with their lengths."""
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        width = max(map(len, part))
        padded = [[tokenizer.pad_id] * (width - len(ids)) + ids for ids in part]
        yield torch.tensor(padded), torch.tensor([len(ids) for ids in part])
