"""The share of held-out questions that the model answers with exactly the expected text."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import tt_data
import tt_models
from tt_train.devices.distributed import world
from tt_train.devices.sharding import is_sharded
from tt_train.evaluate import end_ids, evaluating, gather_embeddings
from tt_train.inputs.questions import Question

MORE_TOKENS = 8  # than the expected answer has, which may be spelt with other tokens
AT_ONCE = 128  # questions of a batch on one rank, at the most


def exact_match(
    model: tt_models.Decoder,
    tokenizer: tt_data.Tokenizer,
    asked: Sequence[Question],
    *,
    tokens_at_once: int,
    device: torch.device,
) -> dict[str, float]:
    """``eval_exact_match``, and ``eval_exact_match_NAME`` of each named set: shares of ``asked``, each asked once.

    Answers are greedy. One is right if it ends, and its text equals the expected one, without blanks (``str.strip``)
    around both; the end token is not text. It is cut when it has 8 tokens more than the expected one, and is wrong
    then. A batch on one rank has up to ``tokens_at_once`` tokens, with those to come.
    """
    here, ends, sharded = world(), end_ids(model, tokenizer), is_sharded(model)
    names = list(dict.fromkeys(question.name for question in asked))
    right = torch.zeros(len(names), dtype=torch.float64)

    def all_have_stopped(finished_B: Tensor) -> bool:
        stopped = bool(finished_B.all())
        return not here.any(not stopped) if sharded else stopped  # the passes of sharded weights are collectives

    with evaluating(model):
        gather_embeddings(model, device)
        longest = model.config.max_position_embeddings
        for batch in _batches(asked, ranks=here.size, tokens_at_once=tokens_at_once, longest=longest):
            own = batch[here.rank :: here.size]
            if not own and not sharded:
                continue
            prompts = [question.ids for question in own or batch[:1]]  # a rank without questions takes part
            most = min(_room(batch), max(1, longest - max(len(question.ids) for question in batch) + 1))
            answers_BS = tt_models.generate(
                model, prompts, max_new_tokens=most, temperature=0.0, eos_ids=ends, until=all_have_stopped
            )[:, max(map(len, prompts)) :]
            for question, ids in zip(own, answers_BS.tolist(), strict=False):
                right[names.index(question.name)] += _is_right(question, ids, ends, tokenizer)
    counts = [sum(question.name == name for question in asked) for name in names]
    shares = here.sum(right).tolist()
    figures = {"eval_exact_match": sum(shares) / len(asked)}
    return figures | {f"eval_exact_match_{name}": share / count
                      for name, share, count in zip(names, shares, counts, strict=True) if name}  # fmt: skip


def _batches(
    asked: Sequence[Question], *, ranks: int, tokens_at_once: int, longest: int
) -> Iterator[Sequence[Question]]:
    """The questions of all ranks together: answers of similar length, so that few rows wait for the longest one."""
    batch: list[Question] = []
    for question in sorted(asked, key=lambda one: (-one.tokens, -len(one.ids))):
        grown = [*batch, question]
        prompt, rows = max(len(one.ids) for one in grown), -(-len(grown) // ranks)
        fits = prompt + max(one.tokens for one in grown) - 1 <= longest  # else the answer could not be given
        if batch and (not fits or rows > AT_ONCE or rows * (prompt + _room(grown)) > tokens_at_once):
            yield batch
            grown = [question]
        batch = grown
    if batch:
        yield batch


def _room(batch: Sequence[Question]) -> int:
    return max(question.tokens for question in batch) + MORE_TOKENS


def _is_right(question: Question, ids: Sequence[int], ends: Sequence[int], tokenizer: tt_data.Tokenizer) -> bool:
    end = next((place for place, index in enumerate(ids) if index in ends), None)
    return end is not None and tokenizer.decode(ids[:end]).strip() == question.expected.strip()
