"""What quantization does to a model: its perplexity, its greedy answers and its speed, before and after."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

import tt_data
import tt_models
from tt_train.evaluate import end_ids, evaluating, held_out_figures
from tt_train.losses.cross_entropy import IGNORE, cross_entropy

ROWS, PROMPTS, NEW_TOKENS, LONGEST_PROMPT = 64, 8, 32, 256
Row = dict[str, list[int]]
TEXT = "a fixed text of about 350 words; it shows damage, not how good the model is (--data rows.jsonl measures yours)"
# read as it is, without a chat template
_TEXTS = (
    "Water freezes at zero degrees Celsius and boils at one hundred degrees at sea level. On a high mountain the air "
    "is thinner, so water boils at a lower temperature, and food takes longer to cook.",
    "The library opens at nine in the morning. Visitors may borrow up to five books for three weeks. If nobody else "
    "has asked for a book, it can be renewed once, at the desk or by telephone.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total = total + value\n    return total / "
    "len(values)\n\n\nprint(mean([1, 2, 3, 4]))\n",
    "Question: A train leaves at 10:15 and arrives at 12:45. How long does the journey take?\nAnswer: From 10:15 to "
    "12:15 is two hours, and from 12:15 to 12:45 is another thirty minutes. The journey takes two and a half hours.",
    "Dear Anna,\n\nthank you for your letter. The garden is full of apples this year, and we do not know what to do "
    "with all of them. Could you come and visit us on Sunday? Bring the children and a large basket.\n\nYours, Peter",
    "The old harbour lies at the mouth of the river. For three hundred years ships carried wool, salt and timber from "
    "here to the towns across the sea. Today most of the warehouses have become shops and restaurants, but in the "
    "early morning one can still watch the fishing boats come in.",
    "Plants use the light of the sun to turn water and carbon dioxide into sugar. Oxygen is left over and goes into "
    "the air. At night, when there is no light, they breathe as animals do: they use oxygen and burn sugar.",
    "To make bread, mix five hundred grams of flour with water, a little salt and yeast. Knead the dough for ten "
    "minutes and let it rest in a warm place until it has doubled in size. Then bake it in a hot oven for about half "
    "an hour.",
)  # fmt: skip


class Figures(TypedDict):
    """``tokens_per_s``: of greedy answers one at a time, on this machine."""

    perplexity: float | None
    tokens_per_s: float


class Measured(TypedDict):
    """``answers``: the ids of the greedy answer to each prompt."""

    figures: Figures
    answers: list[list[int]]


class Agreement(TypedDict):
    """``same_tokens``: the mean share of an answer's tokens that come before the first difference."""

    answers: int
    identical: int
    same_tokens: float


def rows_of(data: str | Path | None, tokenizer: tt_data.Tokenizer, *, longest: int) -> list[Row]:
    """Rows to measure with: the first ones of ``data``, or the fixed text. ValueError if there is no trained token."""
    if data is None:
        made = [tokenizer.encode(text, add_bos=tokenizer.adds_bos, add_eos=False)[:longest] for text in _TEXTS]
        return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in made if len(ids) > 1]
    dataset = tt_data.load_dataset(data, tokenizer, max_seq_len=longest, limit=ROWS)
    if dataset.kind != "single":
        raise ValueError(f"--data: {data}: {dataset.schema} rows compare answers; give rows of one answer each")
    rows = [{key: list(dataset[index][key]) for key in ("input_ids", "labels")} for index in range(len(dataset))]
    if not any(label != IGNORE for row in rows for label in row["labels"][1:]):
        raise ValueError(f"{data}: its first {ROWS} rows have no answer to measure; take rows with answers or text")
    return rows


def measure(model: tt_models.Decoder, tokenizer: tt_data.Tokenizer, rows: Sequence[Row]) -> Measured:
    """The perplexity of the rows' trained tokens, and the greedy answers to the prompts of the first ones."""
    device = model.model.embed_tokens.weight.device
    pad = tokenizer.pad_id if tokenizer.pad_id < model.config.vocab_size else 0
    found = held_out_figures(model, rows, cross_entropy, micro_batch_size=1, pad_id=pad, device=device)
    ends, answers, start = end_ids(model, tokenizer), [], time.perf_counter()
    with evaluating(model):
        for row in rows[:PROMPTS]:
            ids = torch.tensor([_prompt(row)], device=device)
            said = tt_models.stream(model, ids, max_new_tokens=NEW_TOKENS, temperature=0.0, eos_ids=ends)
            answers.append(list(said))
    seconds = time.perf_counter() - start
    figures = Figures(perplexity=found.get("eval_perplexity"), tokens_per_s=sum(map(len, answers)) / max(seconds, 1e-9))
    return Measured(figures=figures, answers=answers)


def _prompt(row: Row) -> list[int]:
    """What is before the first trained token; of a row that is trained from its beginning, the first half."""
    first = next((place for place, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))
    ids = row["input_ids"]
    return ids[: first if first > 1 else max(1, len(ids) // 2)][-LONGEST_PROMPT:]


def agreement(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> Agreement:
    """How far the answers of two models are the same."""
    shares = []
    for one, other in zip(before, after, strict=True):
        longest = max(len(one), len(other))
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        shares.append(same / longest if longest else 1.0)
    mean = sum(shares) / len(shares) if shares else 1.0
    return Agreement(answers=len(shares), identical=sum(share == 1.0 for share in shares), same_tokens=mean)


def same_next_token(model: tt_models.Decoder, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> float:
    """How often the model's likeliest next token is that of ``answers``, given the answer up to there.

    After a first difference two greedy answers have nothing in common; this counts every token.
    """
    device, same, count = model.model.embed_tokens.weight.device, 0, 0
    with evaluating(model):
        for row, said in zip(rows, answers, strict=False):
            prompt = _prompt(row)
            logits = model(torch.tensor([[*prompt, *said]], device=device))[0, len(prompt) - 1 : -1]
            same += int((logits.argmax(-1) == torch.tensor(list(said), device=device)).sum())
            count += len(said)
    return same / count if count else 1.0


def facts(before: Measured, after: Measured, source: str) -> dict[str, Any]:
    """The two measurements beside each other, ready for JSON."""
    return {
        "measured_on": source,
        "before": before["figures"],
        "after": after["figures"],
        "greedy_agreement": agreement(before["answers"], after["answers"]),
    }
