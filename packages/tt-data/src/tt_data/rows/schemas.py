"""The kinds of rows: the columns that each needs, and which kind a row is."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tt_data.examples import Columns, Completion, Example, Pair, Row, find, optional
from tt_data.messages import is_role
from tt_data.rows.conversations import as_turns, messages_or_text
from tt_data.rows.converters import (
    ADDED,
    CHAT_COLUMNS,
    COMPLETION,
    INPUT,
    LABEL,
    OUTPUT,
    InstructReader,
    judgement,
    read_alpaca,
    read_chat,
    read_completion,
    read_judged,
    read_plain_completion,
    read_text,
    read_tokens,
)
from tt_data.rows.pairs import QUESTIONS, read_pair, read_pair_of_texts
from tt_data.rows.settings import Settings
from tt_data.template.prompts import INSTRUCT_TEMPLATES
from tt_data.template.sources import CHAT_TEMPLATES
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import did_you_mean, names_of, nearest, visible

Read = Callable[[Row, Columns], Example]
_NEED_TEMPLATE = ("openai", "sharegpt")
_LONGEST = 60  # characters of a name that is compared with others
_TREE = ("parent_id", "message_tree_id")  # OpenAssistant's: a row is one message of a tree
# What people call our columns, for suggestions.
_ALSO_CALLED: Mapping[str, Sequence[str]] = {
    "prompt": ("question", "query", "problem", "source", "instruction", "input"),
    "completion": ("answer", "solution", "target", "reply", "output", "generation"),
    "messages": ("chat", "dialog", "dialogue", "turns"),
    "chosen": ("preferred", "accepted", "response_j"),
    "rejected": ("dispreferred", "refused", "response_k"),
}


# Rows that are not read: the columns by which they are recognised, and what to write instead.
_FOREIGN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("query", "tools", "answers"),
        "these are rows of function calls (xLAM's): write each as messages, a user turn with the query and an "
        "assistant turn with the answers as tool_calls, and the tools as JSON schemas in a column 'tools'",
    ),
    (
        ("input", "preferred_output", "non_preferred_output"),
        "these are OpenAI's preference rows: write each with the columns 'prompt' (the messages of input), 'tools' "
        "(those of input, if there are any), 'chosen' (preferred_output) and 'rejected' (non_preferred_output)",
    ),
)


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
        return isinstance(label, (int, float)) or label is None or judgement(label) is not None
    return isinstance(label, bool) and find(row, columns, *CHAT_COLUMNS) is not None


def _is_sharegpt(row: Row, columns: Columns) -> bool:
    name = find(row, columns, *CHAT_COLUMNS)
    turns = as_turns(messages_or_text(row[name])) if name is not None else None
    return turns is not None and isinstance(turns[0], Mapping) and "from" in turns[0]


def _is_no_message(row: Row, columns: Columns) -> bool:
    """Whether the row is a text, not one message of a conversation or of a tree (``columns`` can name the text)."""
    return "text" in columns or not (any(name in row for name in _TREE) or is_role(row.get("role")))


SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("pretokenized", (("input_ids",),), read_tokens),
        Schema("preference", (("chosen",), ("rejected",)), read_pair),
        Schema("unpaired_preference", (("prompt", *CHAT_COLUMNS), LABEL), read_judged, _is_judged),
        Schema("sharegpt", (CHAT_COLUMNS,), read_chat, _is_sharegpt),
        Schema("openai", (CHAT_COLUMNS,), read_chat),
        Schema("alpaca", (("instruction",), OUTPUT), read_alpaca),
        Schema("prompt_completion", (("prompt",), COMPLETION), read_completion),
        Schema("text", (("text",),), read_text, _is_no_message),
    )
}
_OPTIONAL = (*INPUT, *ADDED, *QUESTIONS, "labels", "attention_mask", "position_ids", "seq_lengths", "completion_mask",
             "assistant_masks", "loss_mask")  # fmt: skip
_OURS: tuple[object, ...] = (*SCHEMAS.values(), *INSTRUCT_TEMPLATES.values())
_OUR_READERS = frozenset(schema.read for schema in SCHEMAS.values())  # which say what they have read


def register_schema(schema: Schema) -> None:
    """Make a kind of row known; it is tried before the others."""
    ours = dict(SCHEMAS)
    SCHEMAS.clear()
    SCHEMAS.update({schema.name: schema, **{name: known for name, known in ours.items() if name != schema.name}})


def known_columns() -> list[str]:
    """Every column name that a schema reads."""
    needed = {name for schema in SCHEMAS.values() for names in schema.columns for name in names}
    return sorted({*needed, *_OPTIONAL})


def detect_schema(row: Row, columns: Columns, *, where: str) -> Schema:
    """The schema of ``row``. Raises ValueError that names the columns, the known schemas, and the nearest column."""
    unknown = [name for name in columns if name not in known_columns()]
    if unknown:
        hint = did_you_mean(unknown[0], known_columns())
        raise ValueError(
            f"columns: tt_data reads no column {unknown[0]!r}, expected one of {', '.join(known_columns())}{hint}"
        )
    for name, theirs in columns.items():
        if theirs not in row:
            hint = did_you_mean(theirs, list(row))
            raise ValueError(f"{where}: columns maps {name} to {theirs!r}, but the row has [{names_of(row)}]{hint}")
    found = next((schema for schema in SCHEMAS.values() if schema.matches(row, columns)), None)
    if found is None:
        raise ValueError(f"{where}: {_no_schema(row, columns)}")
    return found


def _no_schema(row: Row, columns: Columns) -> str:
    role = next((name for name in ("role", "from", *_TREE) if name in row), None)
    if role is not None and (role in _TREE or is_role(row[role])):
        return (
            f"a row is one message here (it has {role!r}), expected a conversation; write each conversation as one row "
            "first (of a tree: from its root to each leaf), or read every message as text with schema=text"
        )
    for names, advice in _FOREIGN:
        if all(name in row for name in names):
            return f"no known schema has the columns [{names_of(row)}]; {advice}"
    wanted = "; ".join(f"{s.name}: {' + '.join('/'.join(names) for names in s.columns)}" for s in SCHEMAS.values())
    return f"no known schema has the columns [{names_of(row)}], expected one of ({wanted}){_suggestion(row, columns)}"


def _suggestion(row: Row, columns: Columns) -> str:
    """``columns={"text": "txt"}`` for the schema that lacks least, other names for our columns before misspelt ones."""
    guesses: list[tuple[int, dict[str, str]]] = []
    for schema in SCHEMAS.values():
        guess: dict[str, str] = {}
        misspelt = 0
        for names in schema.columns:
            if any(columns.get(name, name) in row for name in names):
                continue
            left = [str(name) for name in row if name not in guess.values() and len(str(name)) <= _LONGEST]
            called = next((n for n in left if n.lower() in _ALSO_CALLED.get(names[0], ())), None)
            near = called or next(filter(None, (nearest(name, left, 0.5) for name in names)), None)
            if near is None:
                break
            guess[names[0]] = near
            misspelt += called is None
        else:
            guesses.append((misspelt, guess))
    best = min(guesses, key=lambda found: (found[0], len(found[1])), default=(0, {}))[1]
    return f"; did you mean columns={best}?" if best else ""


def hint_for_unread(column: str, row: Row, columns: Columns, read: object) -> str:
    """How to have a column read that ``read`` leaves out: by another schema, or under another name."""
    for schema in SCHEMAS.values():
        if (
            schema.read != read
            and schema.matches(row, columns)
            and any(columns.get(n, n) == column for names in schema.columns for n in names)
        ):
            return f"schema={schema.name} reads it"
    known = known_columns()
    free = [name for name in known if name not in row]
    near = None if column in known else nearest(column[:_LONGEST], free, 0.75)
    return f"did you mean columns={{{near!r}: {visible(column, 60)!r}}}?" if near else ""


# ---- the schema of a source --------------------------------------------------------------------------------------


def _read_alpaca_as_text(row: Row, columns: Columns) -> Completion | Pair:
    return InstructReader(INSTRUCT_TEMPLATES["alpaca"])(row, columns)


def _read_pair_as_text(row: Row, columns: Columns) -> Completion | Pair:
    """Text answers to an instruction are written like alpaca's."""
    is_alpaca = find(row, columns, "instruction") and not optional(row, columns, "prompt")
    return _read_alpaca_as_text(row, columns) if is_alpaca else read_pair_of_texts(row, columns)


_WITHOUT_TEMPLATE: Mapping[str, Read] = {
    "alpaca": _read_alpaca_as_text,
    "preference": _read_pair_as_text,
    "prompt_completion": read_plain_completion,
}


def choose_schema(row: Row, tokenizer: Tokenizer, settings: Settings, *, where: str) -> Schema:
    """The schema of a source, from its first row: what the settings name, else what its columns are.

    Instruction rows of a model without a chat template are written with the alpaca template. Raises ValueError.
    """
    if settings.template in INSTRUCT_TEMPLATES:
        return Schema(f"instruct:{settings.template}", (), InstructReader(INSTRUCT_TEMPLATES[settings.template]))
    if settings.schema is not None:
        schema = _named_schema(settings.schema)
    else:
        schema = detect_schema(row, settings.columns, where=where)
    if tokenizer.has_chat_template:
        return schema
    if schema.name in _NEED_TEMPLATE:
        raise ValueError(
            f"{where}: {schema.name} rows need a chat template and this model has none; "
            f"name one with template=... ({', '.join(CHAT_TEMPLATES)})"
        )
    return replace(schema, read=_WITHOUT_TEMPLATE.get(schema.name, schema.read))


def _named_schema(name: str) -> Schema:
    if name in SCHEMAS:
        return SCHEMAS[name]
    hint = did_you_mean(name, SCHEMAS)
    raise ValueError(f"unknown schema {name!r}, expected one of {', '.join(SCHEMAS)}{hint}")


def tracks(read: Read) -> bool:
    """Whether ``read`` shows, by what it looks at, which columns it reads: ours do; what a user registers may not."""
    return read in _OUR_READERS or read in _WITHOUT_TEMPLATE.values() or isinstance(read, InstructReader)


def settings_key(settings: Settings) -> str:
    """The settings as text, for a fingerprint, with the code of what a user has registered and may be at work."""
    template = INSTRUCT_TEMPLATES.get(settings.template or "")
    functions: list[Callable[..., Any]] = [template.write] if template is not None and template not in _OURS else []
    functions += [schema.read for schema in SCHEMAS.values() if schema not in _OURS]
    changing = {key: value for key, value in asdict(settings).items() if key != "max_dropped_share"}
    return "\0".join([json.dumps(changing, sort_keys=True), *map(_code_of, functions)])


def _code_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into an interpreter, or no plain function
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code.hex()} {code.co_names}"
