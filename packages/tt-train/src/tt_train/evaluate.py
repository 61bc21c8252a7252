"""Held-out loss, and prompts answered by the model while it trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import tt_data
import tt_models
from tt_train.losses import IGNORE, Objective


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients; training mode comes back afterwards, and so does the state of the random generators."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        model.train(training)


def held_out_loss(
    model: nn.Module, dataset: Any, objective: Objective, *, micro_batch_size: int, pad_id: int, device: torch.device
) -> float:
    """Mean loss over every trained token of ``dataset``, each row seen once."""
    total, count = 0.0, 0
    order = sorted(
        range(len(dataset)), key=lambda index: -len(dataset[index]["input_ids"])
    )  # like lengths, little padding
    with evaluating(model):
        for start in range(0, len(order), micro_batch_size):
            rows = [dataset[index] for index in order[start : start + micro_batch_size]]
            batch = to_device(tt_data.collate(rows, pad_id=pad_id), device)
            loss_sum, number = objective(model, batch)
            total += float(loss_sum)
            count += number
    return total / count if count else float("nan")


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def prompts(dataset: Any, tokenizer: Any, *, num: int, max_prompt: int) -> list[dict[str, Any]]:
    """Up to ``num`` prompts of ``dataset``: what stands before a row's first trained token, and the answer expected."""
    found: list[dict[str, Any]] = []
    for index in range(min(len(dataset), 8 * num)):
        if len(found) == num:
            break
        row = dataset[index]
        ids, labels = list(row["input_ids"]), list(row["labels"])
        first = next((place for place, label in enumerate(labels) if label != IGNORE), 0)
        if not 0 < first <= max_prompt:
            continue
        end = next((place for place in range(first, len(labels)) if labels[place] == IGNORE), len(labels))
        found.append(
            {"ids": ids[:first], "prompt": tokenizer.decode(ids[:first]), "expected": tokenizer.decode(ids[first:end])}
        )
    return found


def answer(
    model: tt_models.Decoder,
    tokenizer: Any,
    asked: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Greedy answers to ``prompts``: rows of samples.jsonl without their step."""
    rows = []
    with evaluating(model):
        for item in asked:
            ids = torch.tensor([item["ids"]], device=device)
            output = list(
                tt_models.stream(model, ids, max_new_tokens=max_new_tokens, temperature=0.0, eos_ids=tokenizer.eos_ids)
            )
            rows.append(
                {"prompt": item["prompt"], "expected": item["expected"], "generation": tokenizer.decode(output)}
            )
    return rows
