"""The named data sets and their builders: instruction rows, conversations, preferences.

Each takes the tokenizer and a ``source`` (hub id, local files, rows) and returns what ``load_dataset`` returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import signature
from typing import Any, ParamSpec

from tt_data.examples import BadRowError, Columns, Conversation, Turns
from tt_data.loading.load import load
from tt_data.messages import Message, TrainOn
from tt_data.rows.conversations import read_chat
from tt_data.rows.converters import InstructReader
from tt_data.rows.hub import DATASETS, Part
from tt_data.rows.schemas import Read, Settings
from tt_data.rows.sources import resolve_name
from tt_data.stream.stream import Stream
from tt_data.template.prompts import InstructTemplate, get_chat_format, get_instruct_template
from tt_data.text.tokenizer import Tokenizer
from tt_data.token_rows.dataset import Dataset
from tt_data.wording import did_you_mean

Row = Mapping[str, Any]
P = ParamSpec("P")
_PART = ("split", "data_dir", "data_files", "revision")
_LOADING = (
    "on_bad_row", "special_tokens", "drop_duplicates", "max_dropped_share", "streaming", "packing", "seed", "buffer",
    "cache_dir", "num_workers", "timeout_s", "limit", "progress",
)  # fmt: skip


def refuses_unknown(function: Callable[P, Dataset | Stream]) -> Callable[P, Dataset | Stream]:
    """``function``, with an error that names a keyword that neither it nor ``load_dataset`` has."""
    known = [name for name in signature(function).parameters if name != "options"] + [*_PART, *_LOADING]

    @wraps(function)
    def checked(*words: P.args, **options: P.kwargs) -> Dataset | Stream:
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or f", expected one of {', '.join(known)}"
                raise TypeError(f"{function.__name__}: unknown argument {name!r}{hint}")
        return function(*words, **options)

    return checked


@refuses_unknown
def instruct_dataset(
    tokenizer: Tokenizer, *, source: Any, template: str | InstructTemplate, column_map: Columns | None = None,
    transform: Callable[[Row], Row] | None = None, train_on_input: bool = False, max_seq_len: int | None = None,
    **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """Rows written as a prompt by an instruct template, and their ``output`` column.

    ``column_map``: the template's column names (and ``output``) to the rows'. ``transform`` changes each row first.
    ``options``: ``split``, ``data_dir``, ``packing``, ``streaming``, ``seed``, ``on_bad_row``, ... of ``load_dataset``.
    """
    if isinstance(template, str):
        template = get_instruct_template(template)
    read = _transformed(InstructReader(template), transform)
    return _load(tokenizer, source, read, "instruct", column_map, train_on_input, max_seq_len, options)


@refuses_unknown
def chat_dataset(
    tokenizer: Tokenizer, *, source: Any, conversation_style: str = "sharegpt", chat_format: str | None = None,
    column_map: Columns | None = None, transform: Callable[[Row], Row] | None = None, train_on_input: bool = False,
    max_seq_len: int | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """Conversations. ``chat_format`` writes them as plain text around each turn, which then begins with bos and ends
    with eos; None takes the model's own chat template. ``conversation_style``: sharegpt or openai."""
    if conversation_style not in ("sharegpt", "openai"):
        raise ValueError(f"conversation_style must be sharegpt or openai, got {conversation_style!r}")
    read = read_chat if chat_format is None else _formatted(chat_format)
    return _load(
        tokenizer, source, _transformed(read, transform), conversation_style, column_map, train_on_input, max_seq_len,
        options,
    )  # fmt: skip


@refuses_unknown
def preference_dataset(
    tokenizer: Tokenizer, *, source: Any, template: str | InstructTemplate, column_map: Columns | None = None,
    transform: Callable[[Row], Row] | None = None, max_seq_len: int | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """A prompt by an instruct template with a ``chosen`` and a ``rejected`` answer. The prompt gives no loss."""
    return instruct_dataset(
        tokenizer, source=source, template=template, column_map=column_map, transform=transform,
        max_seq_len=max_seq_len, **options,
    )  # fmt: skip


@refuses_unknown
def alpaca_dataset(
    tokenizer: Tokenizer, *, source: Any = "tatsu-lab/alpaca", train_on_input: bool = True, max_seq_len: int = 512,
    column_map: Columns | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """Alpaca: instruction, input, output."""
    return instruct_dataset(
        tokenizer, source=source, template="alpaca", column_map=column_map, train_on_input=train_on_input,
        max_seq_len=max_seq_len, **options,
    )  # fmt: skip


alpaca_cleaned_dataset = partial(alpaca_dataset, source="yahma/alpaca-cleaned")


@refuses_unknown
def grammar_dataset(
    tokenizer: Tokenizer, *, source: Any = "liweili/c4_200m", train_on_input: bool = False,
    max_seq_len: int | None = None, column_map: Columns | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """C4-200M: ``input`` with mistakes, ``output`` without."""
    columns = {**DATASETS["grammar"].columns, **(column_map or {})}
    return instruct_dataset(
        tokenizer, source=source, template="grammar", column_map=columns, train_on_input=train_on_input,
        max_seq_len=max_seq_len, **options,
    )  # fmt: skip


@refuses_unknown
def samsum_dataset(
    tokenizer: Tokenizer, *, source: Any = "Samsung/samsum", train_on_input: bool = False,
    max_seq_len: int | None = None, column_map: Columns | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """SAMSum: ``dialogue`` and ``summary``."""
    columns = {**DATASETS["samsum"].columns, **(column_map or {})}
    return instruct_dataset(
        tokenizer, source=source, template="summarize", column_map=columns, train_on_input=train_on_input,
        max_seq_len=max_seq_len, **options,
    )  # fmt: skip


@refuses_unknown
def slimorca_dataset(
    tokenizer: Tokenizer, *, source: Any = "Open-Orca/SlimOrca-Dedup", max_seq_len: int = 1024,
    train_on_input: bool = False, chat_format: str | None = "llama2", column_map: Columns | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """SlimOrca: sharegpt conversations in the Llama-2 format. Raises ValueError for ``max_seq_len`` under 4."""
    if max_seq_len < 4:
        raise ValueError(f"max_seq_len must be at least 4 for slimorca, got {max_seq_len}")
    return chat_dataset(
        tokenizer, source=source, chat_format=chat_format, train_on_input=train_on_input, max_seq_len=max_seq_len,
        column_map=column_map, **options,
    )  # fmt: skip


@refuses_unknown
def stack_exchange_paired_dataset(
    tokenizer: Tokenizer, *, source: Any = "lvwerra/stack-exchange-paired", max_seq_len: int | None = 1024,
    column_map: Columns | None = None, **options: Any,
) -> Dataset | Stream:  # fmt: skip
    """StackExchange: ``question`` with a better (``response_j``) and a worse (``response_k``) answer."""
    columns = {**DATASETS["stack_exchange_paired"].columns, **(column_map or {})}
    return preference_dataset(
        tokenizer, source=source, template="stack_exchange_paired", column_map=columns, max_seq_len=max_seq_len,
        **options,
    )  # fmt: skip


stack_exchanged_paired_dataset = stack_exchange_paired_dataset


def _load(
    tokenizer: Tokenizer, source: Any, read: Read, schema: str, column_map: Columns | None, train_on_input: bool,
    max_seq_len: int | None, options: dict[str, Any],
) -> Dataset | Stream:  # fmt: skip
    part = Part(**{key: options.pop(key) for key in _PART if key in options})
    if isinstance(source, str) and not os.path.lexists(source):
        ours = next((name for name, known in DATASETS.items() if source in (name, known.source)), source)
        source, part, _ = resolve_name(ours, part)
    train_on: TrainOn = "all" if train_on_input else "assistant"
    settings = Settings(
        columns=dict(column_map or {}), train_on=train_on, max_seq_len=max_seq_len, read=read, read_as=schema,
        part=part, **options,
    )  # fmt: skip
    return load(source, tokenizer, settings)


def _transformed(read: Read, transform: Callable[[Row], Row] | None) -> Read:
    if transform is None:
        return read
    return lambda row, columns: read(transform(row), columns)


def _formatted(name: str) -> Read:
    """Conversations as messages whose text contains the format."""
    chat_format = get_chat_format(name)

    def read(row: Row, columns: Columns) -> Turns:
        conversation: Conversation = read_chat(row, columns)
        messages: list[Message] = list(conversation.messages)
        try:
            return Turns(messages, chat_format.format(messages))
        except ValueError as error:
            raise BadRowError("wrong roles", str(error)) from None

    return read
