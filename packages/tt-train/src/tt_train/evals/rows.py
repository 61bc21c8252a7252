"""A model on rows of one's own: held-out loss, exact match, and metrics of one's own; ``tt eval --data``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tt_data
from tt_train.config import RunConfig
from tt_train.devices.distributed import world
from tt_train.errors import ConfigError
from tt_train.evals.answer import Answer, Wanted
from tt_train.evals.results import Figure
from tt_train.evals.score import Scorer
from tt_train.evaluate import held_out_figures
from tt_train.inputs.questions import Question, questions
from tt_train.inputs.rows import read_rows
from tt_train.losses.cross_entropy import cross_entropy
from tt_train.models.origin import Origin
from tt_train.records.run_files import number
from tt_train.run.exact_match import MORE_TOKENS
from tt_train.settings.registry import allowed_import

Metric = Callable[[list[str], list[str], list[str]], Mapping[str, float]]
ROWS_AT_ONCE = 8  # of the held-out loss, if the size of a batch is not given


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a metric gets: texts of equal number, in the order of the rows."""

    prompts: list[str]
    answers: list[str]
    expected: list[str]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """``source``: anything that ``data.train`` may be; ``limit``: only its first rows.

    max_new_tokens: of an answer; by default 8 more than the longest expected one has.
    """

    source: str
    limit: int | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    max_new_tokens: int | None = None


def find_metrics(names: Sequence[str], allow_import: Sequence[str]) -> dict[str, Metric]:
    """The functions ``module:function``. ConfigError if a module is not in ``allow_import``, or has no such function.

    A metric is called as ``function(prompts, answers, expected)`` with lists of texts, and returns numbers by name.
    """
    found = {}
    for name in names:
        module, colon, function = name.partition(":")
        if not colon or not module or not function.isidentifier():
            raise ConfigError([f"--metric: expected module:function, got {name!r}"])
        found[name] = allowed_import("--metric", f"{module}.{function}", allow_import)
        if not callable(found[name]):
            raise ConfigError([f"--metric: {name} is not a function"])
    return found


def rows_of(origin: Origin, asked: Rows, tokenizer: tt_data.Tokenizer, *, longest: int) -> Any:
    """The rows, read as those that the run was trained on (of a model: as ``tt run sft`` would)."""
    config = RunConfig() if origin.run is None else origin.run.compose()
    where: dict[str, Any] = dict.fromkeys(("split", "data_dir", "data_files", "revision", "cache_dir"))
    data = replace(config.data, packing=False, streaming=False, num_workers=0, **where)
    longest = longest if origin.run is None else min(longest, config.data.max_seq_len)
    options: dict[str, Any] = {} if asked.limit is None else {"limit": asked.limit}
    rows = read_rows(replace(config, data=data), asked.source, tokenizer, longest, **options)
    if rows.kind != "single":
        raise ConfigError([f"--data: {asked.source}: {rows.schema} rows compare answers; give rows of one answer each"])
    return rows


def evaluate_rows(
    scorer: Scorer, rows: Any, asked: Rows, *, tell: Callable[[str], None]
) -> tuple[list[Figure], Answers]:
    """Loss and perplexity over every trained token of ``rows``, and greedy answers to those that can be asked.

    Every rank calls it, and rank 0 has the answers. Exact match is that of ``samples.exact_match``: the answer ended,
    and is the expected text but for blanks around both.
    """
    model, tokenizer = scorer.model, scorer.tokenizer
    device = model.output_weight.device
    figures = held_out_figures(
        model, rows, cross_entropy, micro_batch_size=scorer.batch_size or ROWS_AT_ONCE, pad_id=tokenizer.pad_id,
        device=device,
    )  # fmt: skip
    wanted = questions(rows, tokenizer, num=len(rows))
    if not world().is_main:
        if wanted:
            scorer.serve()
        return [], Answers(prompts=[], answers=[], expected=[])
    task = "rows"
    found = [Figure(task=task, metric=name.removeprefix("eval_"), value=value, rows=len(rows), higher_is_better=False)
             for name, value in figures.items()]  # fmt: skip
    if len(wanted) < len(rows):
        tell(
            f"exact match: {len(wanted):,} of {len(rows):,} rows can be asked; the others have no prompt before their "
            "first trained token, or no end of the answer within the context"
        )
    if not wanted:
        return found, Answers(prompts=[], answers=[], expected=[])
    answers = _ask(scorer, wanted, asked.max_new_tokens)
    said = Answers(
        prompts=[tokenizer.decode(one.ids) for one in wanted],
        answers=[one.text for one in answers],
        expected=[one.expected for one in wanted],
    )
    right = [one.ended and one.text.strip() == question.expected.strip()
             for one, question in zip(answers, wanted, strict=True)]  # fmt: skip
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
    found.append(
        Figure(task=task, metric="exact_match", value=share, stderr=error, rows=len(right), higher_is_better=True)
    )
    for name, metric in asked.metrics.items():
        found += _own_figures(name, metric, said)
    return found, said


def _ask(scorer: Scorer, asked: Sequence[Question], max_new_tokens: int | None) -> list[Answer]:
    most = max_new_tokens or max(one.tokens for one in asked) + MORE_TOKENS
    longest = max(len(one.ids) for one in asked)
    if max_new_tokens is None:
        most = max(1, min(most, scorer.max_length - longest))
    try:
        return scorer.answers([one.ids for one in asked], Wanted(max_new_tokens=most))
    finally:
        scorer.leave()


def _own_figures(name: str, metric: Metric, said: Answers) -> list[Figure]:
    """What a user's function returns; ConfigError if that is not numbers by name."""
    values = metric(list(said.prompts), list(said.answers), list(said.expected))
    if not isinstance(values, Mapping) or any(number(value) is None for value in values.values()):
        raise ConfigError(
            [f"--metric: {name} must return finite numbers by name, such as {{'f1': 0.5}}, got {str(values)[:80]!r}"]
        )
    return [Figure(task="rows", metric=str(key), value=float(value), rows=len(said.answers), filter=name)
            for key, value in values.items()]  # fmt: skip
