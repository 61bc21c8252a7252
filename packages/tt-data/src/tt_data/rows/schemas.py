"""How rows are read: the settings, the kinds of rows with the columns that each needs, and which kind a row is."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tt_data.examples import (
    Answer,
    BadRowError,
    Columns,
    Conversation,
    Example,
    Judged,
    Pair,
    Row,
    Turns,
    is_empty,
    mistake_in,
)
from tt_data.messages import TrainOn, is_role, roles_of, validate_messages
from tt_data.report import Tally
from tt_data.rows import converters
from tt_data.rows.conversations import CHAT_COLUMNS, TrackedColumns, as_turns, find, read_chat
from tt_data.rows.converters import ADDED, COMPLETION, INPUT, LABEL, OUTPUT, InstructReader
from tt_data.rows.hub import Part
from tt_data.rows.pairs import QUESTIONS, read_alpaca_as_text, read_pair, read_pair_as_text
from tt_data.rows.unknown import TREE, hint_for_unread, no_schema
from tt_data.template.prompts import INSTRUCT_TEMPLATES, our_name
from tt_data.template.sources import CHAT_TEMPLATES
from tt_data.text.load import SpecialTokensInText
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import did_you_mean, names_of, said, visible

Read = Callable[[Row, Columns], Example]
OnBadRow = Literal["drop", "error"]
Progress = Callable[[int, Callable[[], float | None]], None]  # rows read so far, and a count of all of them
_NEED_TEMPLATE = ("openai", "sharegpt")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of ``load_dataset`` that all sources of a mix share. ``read`` (named ``read_as``): how rows are
    read, whatever their columns are. Raises ValueError for a wrong type or value."""

    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: TrainOn = "assistant"
    max_seq_len: int | None = None
    template: str | None = None
    schema: str | None = None
    on_bad_row: OnBadRow = "drop"
    drop_duplicates: bool = True  # but those of a stream are kept
    special_tokens: SpecialTokensInText = "text"
    max_dropped_share: float | None = None  # of the rows: more bad ones than that are an error; duplicates do not count
    packing: bool = False
    streaming: bool = False
    part: Part = field(default_factory=Part)
    seed: int = 0
    buffer: int = 10_000
    cache_dir: str | Path | None = None
    num_workers: int = 0
    spare_workers: int = 0
    timeout_s: float = 300.0
    limit: int | None = None
    sample: bool = False
    read: Read | None = None
    read_as: str = ""
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name, (wanted, *kinds) in _TYPES.items():
            value = getattr(self.part if name in _OF_A_PART else self, name)
            fits = isinstance(value, tuple(kinds)) and isinstance(value, bool) == (kinds == [bool])
            if fits and kinds == [Mapping]:
                fits = all(isinstance(word, str) for pair in value.items() for word in pair)
            if fits and kinds == [str]:
                fits = len(value) < _LONGEST and value.isprintable()
            if not fits and not (value is None and name in _OPTIONAL):
                raise ValueError(f"{name} must be {wanted}, got {visible(repr(value), 80)}")
        if self.train_on not in get_args(TrainOn):
            raise ValueError(f"train_on must be one of {', '.join(get_args(TrainOn))}, got {self.train_on!r}")
        if self.special_tokens not in ("text", "tokens"):
            raise ValueError(f"special_tokens must be text or tokens, got {self.special_tokens!r}")
        if self.on_bad_row not in ("drop", "error"):
            raise ValueError(f"on_bad_row must be drop or error, got {self.on_bad_row!r}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")
        if self.max_dropped_share is not None and not 0 <= self.max_dropped_share <= 1:
            raise ValueError(f"max_dropped_share must be between 0 and 1, got {self.max_dropped_share}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.spare_workers < 0:
            raise ValueError(f"spare_workers must be at least 0, got {self.spare_workers}")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.packing and self.max_seq_len is None:
            raise ValueError("packing needs max_seq_len: the length of a packed row")
        if self.sample and (self.streaming or self.limit is not None):
            raise ValueError("sample: not with streaming or limit, which read the first rows")
        if self.limit is not None and (self.limit < 1 or self.packing):
            raise ValueError(f"limit must be at least 1 and not with packing, which needs all rows; got {self.limit}")
        object.__setattr__(self, "columns", dict(self.columns))
        object.__setattr__(self, "drop_duplicates", self.drop_duplicates and not self.streaming)
        if self.template is not None:
            object.__setattr__(self, "template", our_name(self.template))


# The settings that decide the rows, and so change the fingerprint.
DECIDING = (
    "columns", "train_on", "max_seq_len", "template", "schema", "on_bad_row", "drop_duplicates", "special_tokens",
)  # fmt: skip
_NAME, _FLAG = ("a name", str), ("true or false", bool)
_COUNT, _NUMBER = ("a whole number", int), ("a number", int, float)
_TYPES: Mapping[str, tuple[Any, ...]] = {
    "columns": ("an object of names", Mapping), "packing": _FLAG, "split": _NAME, "seed": _COUNT, "streaming": _FLAG,
    "template": _NAME, "schema": _NAME, "max_seq_len": _COUNT, "drop_duplicates": _FLAG, "max_dropped_share": _NUMBER,
    "buffer": _COUNT, "num_workers": _COUNT, "spare_workers": _COUNT, "timeout_s": _NUMBER, "data_dir": _NAME,
    "revision": _NAME, "limit": _COUNT, "train_on": _NAME, "on_bad_row": _NAME, "special_tokens": _NAME,
}  # fmt: skip
_OF_A_PART = ("split", "data_dir", "revision")
_OPTIONAL = (*_OF_A_PART, "template", "schema", "max_seq_len", "max_dropped_share", "limit")
_LONGEST = 1000  # characters of a name


@dataclass(frozen=True)
class Schema:
    """A kind of row: the ``columns`` it needs (in any of their spellings), and ``read``. ``values``: what they hold."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    read: Read
    values: Callable[[Row, Columns], bool] = lambda row, columns: True

    def matches(self, row: Row, columns: Columns) -> bool:
        return all(any(columns.get(n, n) in row for n in names) for names in self.columns) and self.values(row, columns)


def _is_judged(row: Row, columns: Columns) -> bool:
    """A prompt, its completion and a label that says true or false; or turns and a label that is a boolean."""
    label = row[find(row, columns, *LABEL) or ""]
    if find(row, columns, "prompt") and find(row, columns, *COMPLETION):
        return isinstance(label, (int, float)) or label is None or converters.judgement(label) is not None
    return isinstance(label, bool) and find(row, columns, *CHAT_COLUMNS) is not None


def _is_sharegpt(row: Row, columns: Columns) -> bool:
    held = row[find(row, columns, *CHAT_COLUMNS) or ""]
    turns = held if isinstance(held, list) else as_turns(held)
    return bool(turns) and isinstance(turns, list) and isinstance(turns[0], Mapping) and "from" in turns[0]


def _is_no_message(row: Row, columns: Columns) -> bool:
    """Whether the row is a text, not one message of a conversation or of a tree (``columns`` can name the text)."""
    return "text" in columns or not (any(name in row for name in TREE) or is_role(row.get("role")))


SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("pretokenized", (("input_ids",),), converters.read_tokens),
        Schema("preference", (("chosen",), ("rejected",)), read_pair),
        Schema("unpaired_preference", (("prompt", *CHAT_COLUMNS), LABEL), converters.read_judged, _is_judged),
        Schema("sharegpt", (CHAT_COLUMNS,), read_chat, _is_sharegpt),
        Schema("openai", (CHAT_COLUMNS,), read_chat),
        Schema("alpaca", (("instruction",), OUTPUT), converters.read_alpaca),
        Schema("prompt_completion", (("prompt",), COMPLETION), converters.read_completion),
        Schema("text", (("text",),), converters.read_text, _is_no_message),
    )
}
_ALSO_READ = (*INPUT, *ADDED, *QUESTIONS, "labels", "attention_mask", "position_ids", "seq_lengths", "completion_mask",
             "assistant_masks", "loss_mask")  # fmt: skip
_OURS: tuple[object, ...] = (*SCHEMAS.values(), *INSTRUCT_TEMPLATES.values())


def register_schema(schema: Schema) -> None:
    """Make a kind of row known; it is tried before the others."""
    ours = dict(SCHEMAS)
    SCHEMAS.clear()
    SCHEMAS.update({schema.name: schema, **{name: known for name, known in ours.items() if name != schema.name}})


def known_columns() -> list[str]:
    """Every column name that a schema reads."""
    needed = {name for schema in SCHEMAS.values() for names in schema.columns for name in names}
    return sorted({*needed, *_ALSO_READ})


_WITHOUT_TEMPLATE: Mapping[str, Read] = {
    "alpaca": read_alpaca_as_text,
    "preference": read_pair_as_text,
    "prompt_completion": converters.read_plain_completion,
}


# What says, by the columns that it looks at, which ones it reads: what a user registers may not.
OUR_READERS = frozenset([*(schema.read for schema in SCHEMAS.values()), *_WITHOUT_TEMPLATE.values()])


def choose_schema(row: Row, tokenizer: Tokenizer, settings: Settings, *, where: str) -> Schema:
    """The schema of a source, from its first row: what the settings name, else what its columns are.

    Instruction rows of a model without a chat template are written with the alpaca template. Raises ValueError that
    names the columns, the known schemas and the nearest column.
    """
    if settings.template in INSTRUCT_TEMPLATES:
        return Schema(f"instruct:{settings.template}", (), InstructReader(INSTRUCT_TEMPLATES[settings.template]))
    schema, columns = SCHEMAS.get(settings.schema or ""), settings.columns
    if settings.schema is not None and schema is None:
        hint = did_you_mean(settings.schema, SCHEMAS)
        raise ValueError(f"unknown schema {settings.schema!r}, expected one of {', '.join(SCHEMAS)}{hint}")
    if schema is None:
        for name, theirs in columns.items():
            if name not in (known := known_columns()):
                raise ValueError(
                    f"columns: tt_data reads no column {name!r}, expected one of {', '.join(known)}"
                    f"{did_you_mean(name, known)}"
                )
            if theirs not in row:
                hint = did_you_mean(theirs, list(row))
                raise ValueError(f"{where}: columns maps {name} to {theirs!r}, but the row has [{names_of(row)}]{hint}")
        schema = next((schema for schema in SCHEMAS.values() if schema.matches(row, columns)), None)
    if schema is None:
        needs = {schema.name: schema.columns for schema in SCHEMAS.values()}
        raise ValueError(f"{where}: {no_schema(row, columns, needs)}")
    if tokenizer.templates:
        return schema
    if schema.name in _NEED_TEMPLATE:
        raise ValueError(
            f"{where}: {schema.name} rows need a chat template and this model has none; "
            f"name one with template=... ({', '.join(CHAT_TEMPLATES)})"
        )
    return replace(schema, read=_WITHOUT_TEMPLATE.get(schema.name, schema.read))


def read_row(
    where: str, row: Mapping[str, Any], columns: Columns, read: Read, tally: Tally
) -> tuple[Example, Sequence[Answer]]:
    """What ``read`` makes of a row, and the answers in it. Raises BadRowError, also for turns that do not make a
    conversation, and ValueError with the place of a mistake in ``read``."""
    if isinstance(columns, TrackedColumns):
        columns.read = set()
    try:
        example = read(row, columns)
        mistake = None if read in OUR_READERS else mistake_in(example)
    except BadRowError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {said(error, 500)}"
        raise ValueError(f"{where}: the converter of these rows failed: {what}") from error
    if mistake:
        raise ValueError(f"{where}: the converter of these rows is wrong: {mistake}")
    if isinstance(columns, TrackedColumns) and len(columns.read) < len(row):
        _leave_unread(where, row, columns, read, tally)
    answers = example.answers if isinstance(example, (Pair, Judged)) else (example,)
    for messages in [answer.messages for answer in answers if isinstance(answer, (Conversation, Turns))]:
        try:
            validate_messages(messages)
        except ValueError as error:
            raise BadRowError("wrong roles", str(error)) from None
        if messages[-1].role != "assistant":
            raise BadRowError("ends with user", f"the last turn is not the assistant's (roles: {roles_of(messages)})")
    return example, answers


def _leave_unread(where: str, row: Row, columns: TrackedColumns, read: Read, tally: Tally) -> None:
    """Count the columns that hold something and were not read."""
    for column in [str(name) for name, value in row.items() if name not in columns.read and not is_empty(value)]:
        if column not in tally.unread:
            others = [schema for schema in SCHEMAS.values() if schema.read != read and schema.matches(row, columns)]
            needs = {schema.name: schema.columns for schema in others}
            tally.hints[column] = hint_for_unread(column, row, columns, needs, known_columns())
        tally.leave(column, where)


def fingerprint_of(content: Sequence[str], tokenizer: Tokenizer, settings: Settings, last: str = "") -> str:
    """Changes with the ``content`` of the rows, with whatever changes ids, with the settings that decide the rows and
    with the code that a user has registered and may be at work. ``last``: anything else."""
    template = INSTRUCT_TEMPLATES.get(settings.template or "")
    functions: list[Callable[..., Any]] = [template.write] if template is not None and template not in _OURS else []
    functions += [schema.read for schema in SCHEMAS.values() if schema not in _OURS]
    deciding = json.dumps({name: getattr(settings, name) for name in DECIDING}, sort_keys=True)
    parts = (*content, tokenizer.fingerprint, deciding, *map(_code_of, functions), last)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _code_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into an interpreter, or no plain function
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code.hex()} {code.co_names}"
