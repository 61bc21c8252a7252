"""The rows that a config names: read, checked for their kind, counted, and held out."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import tt_data
from tt_data import Dataset, JoinedDataset, Stream, Subset, Tokenizer
from tt_train.config import PreferenceSection, RunConfig, named_sets
from tt_train.devices.distributed import world
from tt_train.errors import ConfigError, collect, counted
from tt_train.inputs.encoding import Encoding, is_number, streaming_hint

Kind = Literal["single", "pair", "judged"]  # of rows: what each one holds
_MOST_WORKERS = 8  # beyond these, one process does not read rows as fast as they are encoded
_FEW_STEPS = 10  # of a run: hardly enough to learn from


def count_rows(rows: Dataset | Stream) -> int | None:
    """Rows of a data set, also if it packs them; None for a stream."""
    return None if isinstance(rows, Stream) else rows.num_rows


def sequence_length(config: RunConfig, model_config: Any, notes: list[str]) -> int:
    """``data.max_seq_len``, or less where the model's positions end before it."""
    longest = getattr(model_config, "max_position_embeddings", None) or config.data.max_seq_len
    if longest < config.data.max_seq_len:
        notes.append(f"max_seq_len is {longest}, the model's max_position_embeddings, not {config.data.max_seq_len}")
    return min(longest, config.data.max_seq_len)


def wanted_rows(config: RunConfig) -> Kind:
    """What the recipe of ``config`` trains on."""
    if not isinstance(config.loss, PreferenceSection):
        return "single"
    return "judged" if config.loss.name == "kto" else "pair"


def kind_mistakes(config: RunConfig, key: str, rows: Dataset | Stream | None, *, wanted: Kind) -> list[str]:
    """Preference rows for a recipe of single answers, or the reverse."""
    if rows is None or rows.kind == wanted:
        return []
    if {rows.kind, wanted} == {"pair", "judged"}:
        cure = "use loss.name=kto" if wanted == "pair" else "use kto_pair, sigmoid or another loss over pairs"
        return [
            f"loss.name: {config.loss.name} trains {_KINDS[wanted]}, the rows of {key} hold {_KINDS[rows.kind]}; {cure}"
        ]
    return [
        f"{key}: {rows.schema} rows hold {_KINDS[rows.kind]}, the recipe {config.recipe} trains {_KINDS[wanted]}; give "
        "it other rows, or name with data.schema what else their columns are (openai, alpaca, prompt_completion, ...)"
    ]


_KINDS: dict[str, str] = {
    "single": "one answer each", "pair": "a chosen and a rejected answer (preference)",
    "judged": "an answer and a judgement (unpaired_preference)",
}  # fmt: skip


def evaluation_mistakes(config: RunConfig) -> list[str]:
    """Keys that need held-out rows, or an evaluation between steps, without them."""
    found = []
    if config.early_stop_after and not config.eval_every:
        found.append("early_stop_after: set, but held-out loss is measured at the end only; set eval_every")
    wanted = {"eval_every": config.eval_every, "early_stop_after": config.early_stop_after,
              "samples.exact_match": config.samples.exact_match}  # fmt: skip
    for key, value in wanted.items():
        if value and config.data.eval is None:
            cure = "give data.eval a file or a share such as 0.05"
            found.append(f"{key}: set, but there is nothing to evaluate on; {cure}")
    return found


def training_rows(config: RunConfig, tokenizer: Tokenizer, max_seq_len: int, **options: Any) -> Dataset | Stream:
    """The rows of ``data.train``, all read or as a stream; ``options`` of ``load_dataset`` over those of the config."""
    part = {key: getattr(config.data, key) for key in ("data_dir", "data_files", "revision")}
    streaming = config.data.streaming
    return read_rows(config, config.data.train, tokenizer, max_seq_len, streaming=streaming, **part, **options)


def read_rows(
    config: RunConfig, source: Any, tokenizer: Tokenizer, max_seq_len: int, *, streaming: bool = False, **options: Any
) -> Dataset | Stream:
    """The rows of ``source`` as token ids and labels."""
    keys = ("train_on", "packing", "split", "template", "schema", "on_bad_row", "special_tokens", "drop_duplicates",
            "max_dropped_share")  # fmt: skip
    given: dict[str, Any] = {key: getattr(config.data, key) for key in keys}
    given |= {"columns": config.data.columns or None, "max_seq_len": max_seq_len, "seed": config.seed}
    given |= {"streaming": streaming, "cache_dir": config.data.cache_dir}
    given["num_workers"] = 0 if streaming else config.data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = min(cores // world().local_size, _MOST_WORKERS)  # of this rank
    given["spare_workers"] = share if share > 1 and not streaming else 0
    hint = partial(streaming_hint, config) if source is config.data.train else str
    with Encoding(hint) as progress:
        given["progress"] = progress if world().is_main else None  # every rank encodes all rows
        rows: Dataset | Stream = tt_data.load_dataset(source, tokenizer, **given | options)
    return rows


def packing_notes(config: RunConfig, train: Dataset | Stream, steps_total: int) -> list[str]:
    """A line if rows are so few that packing leaves hardly a step."""
    if (
        not config.data.packing
        or isinstance(train, Stream)
        or config.max_steps is not None
        or steps_total >= _FEW_STEPS
    ):
        return []
    return [
        f"data.packing: {counted(train.num_rows, 'row')} in {counted(len(train), 'pack')} make a run of "
        f"{counted(steps_total, 'step')}; for more steps, lower batch_size or set data.packing=false"
    ]


def hold_out(
    config: RunConfig, train: Any, tokenizer: Tokenizer, max_seq_len: int, *, sample: bool = False
) -> tuple[Any, Any]:
    """(rows to train on, rows held out): other sources (a ``sample`` of their rows), or a seeded share of the training
    rows."""
    read = partial(_held_out, config, tokenizer=tokenizer, max_seq_len=max_seq_len, sample=sample)
    share = config.data.eval
    if isinstance(share, str) and is_number(share):
        share = float(share)
    if sets := named_sets(share):
        problems: list[str] = []
        found = {name: collect(problems, f"data.eval.{name}", partial(read, source)) for name, source in sets.items()}
        parts = {name: rows for name, rows in found.items() if rows is not None}
        if problems:
            raise ConfigError(problems)
        return train, JoinedDataset(parts)
    if not isinstance(share, int | float):
        return train, read(share)
    if not 0 < share < 1:
        raise ConfigError([f"data.eval: a share must be between 0 and 1, got {share}; 5 % is 0.05"])
    if len(train) < 2:
        what, more = ("pack of rows", "set data.packing=false, or ") if config.data.packing else ("row", "")
        raise ConfigError([f"data.eval: {len(train)} {what} cannot be split; {more}give data.eval a separate file"])
    number = min(len(train) - 1, max(1, round(share * len(train))))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return Subset(train, sorted(order[number:])), Subset(train, sorted(order[:number]))


def _held_out(config: RunConfig, source: Any, *, tokenizer: Tokenizer, max_seq_len: int, sample: bool) -> Any:
    is_file = isinstance(source, str) and Path(source).is_file()  # data.split is that of data.train
    own = replace(config, data=replace(config.data, split=None)) if is_file else config
    return read_rows(own, source, tokenizer, max_seq_len, sample=sample)
