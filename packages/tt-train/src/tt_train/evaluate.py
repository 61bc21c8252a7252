"""Held-out loss, and prompts answered by the model while it trains."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

import tt_data
import tt_models
from tt_data.batching.collate import without_loss
from tt_train.devices.distributed import World, world
from tt_train.devices.sharding import is_sharded, reshard_
from tt_train.errors import TrainingError
from tt_train.losses.cross_entropy import IGNORE, Batch, Objective, Summed, cross_entropy
from tt_train.step import agree, summed

_ROLES: dict[str, str] = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"model": "assistant", "ipython": "tool", "observation": "tool", "inst": "user", "/inst": "assistant"},
    **{"system_prompt": "system", "/system_prompt": "user"},
}


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
        reshard_(model)


def held_out_figures(
    model: tt_models.Decoder,
    dataset: Any,
    objective: Objective,
    *,
    micro_batch_size: int,
    pad_id: int,
    device: torch.device,
    prepare: Callable[[Sequence[Batch]], Sequence[Batch]] = list,
) -> dict[str, float]:
    """``eval_loss``, the mean over every trained token of ``dataset`` (over what the objective counts), each row seen
    once; nan if there is none. ``prepare`` gets all batches before the first is evaluated.

    Metrics that the objective names are further figures, with ``eval_`` in front of their names. ``eval_perplexity``
    is the exponential of the mean cross entropy per token, of an objective that is one or has the metric
    ``cross_entropy``. Of named sets (``tt_data.JoinedDataset``), each has figures of its own, with ``_`` and its name
    behind theirs; those without a name are means over the tokens of all sets, not over sets.
    """
    here = world()
    sets = dataset.parts if isinstance(dataset, tt_data.JoinedDataset) else {"": dataset}
    made: dict[str, list[Batch]] = {}
    for name, rows in sets.items():
        share = _share_of_batches(rows, size=micro_batch_size, pad_id=pad_id, here=here)
        made[name] = [to_device(batch, device) for batch in share]
    with evaluating(model):
        parts = [summed(objective, model, batch) for batch in prepare([one for of in made.values() for one in of])]
    figures = _figures(parts, objective, here)
    if isinstance(dataset, tt_data.JoinedDataset):
        for name, batches in made.items():
            own, parts = parts[: len(batches)], parts[len(batches) :]
            of_set = {f"{key}_{name}": value for key, value in _figures(own, objective, here).items()}
            if twice := sorted(figures.keys() & of_set.keys()):
                raise TrainingError(f"data.eval: the set {name} has the figure {twice[0]}, as another; rename the set")
            figures |= of_set
    return figures


def _share_of_batches(dataset: Any, *, size: int, pad_id: int, here: World) -> Iterator[Batch]:
    """This rank's part of every row of ``dataset`` once; the same number of batches on each rank."""
    # rows of similar length share a batch, with little padding
    order = sorted(range(len(dataset)), key=lambda index: -_length(dataset[index]))
    for start in range(0, len(order), size * here.size):
        some = order[start : start + size * here.size]
        rows = [dataset[index] for index in some[here.rank :: here.size]]
        # the passes of a sharded model are collectives: a rank without rows takes part, and adds nothing
        yield tt_data.collate(rows, pad_id=pad_id) if rows else without_loss(dataset[some[0]], pad_id=pad_id)


def _figures(parts: Sequence[Summed], objective: Objective, here: World) -> dict[str, float]:
    """The sums of all batches of all ranks, divided once."""
    total = agree(parts, here, loss=sum(float(part.loss) for part in parts))
    if not total.count:
        return {"eval_loss": math.nan}
    loss = total.loss / total.count
    figures = {"eval_loss": loss, **{f"eval_{name}": value for name, value in total.means.items()}}
    entropy = loss if _is_cross_entropy(objective) else total.means.get("cross_entropy")
    if entropy is not None and total.count == total.tokens:
        figures["eval_perplexity"] = math.exp(entropy) if entropy < 700 else math.inf
    return figures


def _is_cross_entropy(objective: Objective) -> bool:
    """Whether the loss is minus the log-probability of each trained token: without label smoothing."""
    function, options = (objective.func, objective.keywords) if isinstance(objective, partial) else (objective, {})
    return function is cross_entropy and not options.get("label_smoothing")


def _length(row: Mapping[str, Any]) -> int:
    return max(len(row[key]) for key in row if key.endswith("input_ids"))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def prompts(dataset: Any, tokenizer: Any, *, num: int, max_prompt: int) -> list[dict[str, Any]]:
    """Up to ``num`` prompts of ``dataset``: what stands before a row's first trained token, and the answer expected."""
    found: list[dict[str, Any]] = []
    for index in range(min(len(dataset), 8 * num)):
        if len(found) == num:
            break
        row = dataset[index]
        side = "" if "input_ids" in row else "chosen_"
        ids, labels = list(row[f"{side}input_ids"]), list(row[f"{side}labels"])
        first = next((place for place, label in enumerate(labels) if label != IGNORE), 0)
        if not 0 < first <= max_prompt:
            continue
        end = next((place for place in range(first, len(labels)) if labels[place] == IGNORE), len(labels))
        turns = split_turns(ids[:first], tokenizer)
        found.append(
            {
                "ids": ids[:first],
                "prompt": tokenizer.decode(ids[:first]),
                **({"turns": turns} if turns else {}),
                "expected": tokenizer.decode(ids[first:end]),
            }
        )
    return found


def split_turns(ids: Sequence[int], tokenizer: Any) -> list[dict[str, str]]:
    """The turns of a rendered conversation, for people: ``{"role", "content"}``; none if its template names no roles.

    A role is in a control token (``<|user|>``, ``[INST]``) or the first line of the text behind one.
    """

    def name_of(index: int) -> str:
        return str(tokenizer.decode([index], skip_special=False)).strip("<>[]|\uff5c ").lower()

    def is_control(index: int) -> bool:
        text = tokenizer.decode([index], skip_special=False).strip()
        hidden = bool(text) and not tokenizer.decode([index])
        return hidden or (text.startswith("<") and name_of(index) in _ROLES)  # some are not flagged

    turns: list[dict[str, str]] = []
    behind_control = headed = False  # headed: the last turn has its role, and its content comes next
    for control, group in itertools.groupby(ids, key=is_control):
        if control:
            roles = [_ROLES[name] for name in map(name_of, group) if name in _ROLES]
            turns += [{"role": role, "content": ""} for role in roles]
            behind_control, headed = True, headed or bool(roles)
            continue
        text = tokenizer.decode(list(group))
        head, newline, rest = text.lstrip("\n").partition("\n")
        if behind_control and not headed and head.strip().lower() in _ROLES:
            turns.append({"role": _ROLES[head.strip().lower()], "content": rest})
            headed = not newline
        else:
            if not turns:  # some templates put the system message in front of every role
                turns.append({"role": "system", "content": ""})
            turns[-1]["content"] += text
            headed = False
        behind_control = False
    turns = [{**turn, "content": turn["content"].strip("\n")} for turn in turns if turn["content"].strip()]
    return turns if any(turn["role"] != "system" for turn in turns) else []


def answer(
    model: tt_models.Decoder,
    tokenizer: Any,
    asked: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Greedy answers to ``prompts``: rows of samples.jsonl without their step; as long as the model can read them."""
    rows, ends = [], end_ids(model, tokenizer)
    with evaluating(model):
        gather_embeddings(model, device)
        for item in asked:
            ids = torch.tensor([item["ids"]], device=device)
            room = model.config.max_position_embeddings - ids.shape[1] + 1
            most = min(max_new_tokens, room) if room > 0 else max_new_tokens  # none: a rope that stretches
            output = list(tt_models.stream(model, ids, max_new_tokens=most, temperature=0.0, eos_ids=ends))
            kept = {key: item[key] for key in ("prompt", "turns", "expected") if key in item}
            rows.append(kept | {"generation": tokenizer.decode(output)})
    return rows


def gather_embeddings(model: tt_models.Decoder, device: torch.device) -> None:
    """Read a token with a sharded model, so that its embeddings are whole and have the dtype that a cache needs."""
    sharded: bool = is_sharded(model)
    if sharded:
        model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=device))


def end_ids(model: tt_models.Decoder, tokenizer: Any) -> list[int]:
    """The ids that end an answer, of those that the model can say: files also name some that have no embedding."""
    rows = model.model.embed_tokens.num_embeddings
    return [index for index in tokenizer.eos_ids if 0 <= index < rows]
