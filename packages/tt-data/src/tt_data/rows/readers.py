"""How the rows of a source are read: by the schema of their columns, or by a named template."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from tt_data.rows.columns import Columns, as_text, cell, find, optional
from tt_data.rows.converters import COMPLETION, INPUT, OUTPUT, read_plain_completion
from tt_data.rows.examples import BadRowError, Completion, Example, Pair
from tt_data.rows.pairs import read_pair_of_texts
from tt_data.rows.schemas import OUR_READERS, SCHEMAS, Schema, detect_schema
from tt_data.rows.settings import Settings
from tt_data.template.prompts import INSTRUCT_TEMPLATES, InstructTemplate
from tt_data.template.sources import CHAT_TEMPLATES
from tt_data.text.tokenizer import Tokenizer
from tt_data.wording import names_of

Read = Callable[[Mapping[str, Any], Columns], Example]
_NEED_TEMPLATE = ("openai", "sharegpt")
_OURS: tuple[object, ...] = (*SCHEMAS.values(), *INSTRUCT_TEMPLATES.values())


def settings_key(settings: Settings) -> str:
    """The settings as text, for a fingerprint, with the code of what a user has registered and may be at work."""
    template = INSTRUCT_TEMPLATES.get(settings.template or "")
    functions: list[Callable[..., Any]] = [template.write] if template is not None and template not in _OURS else []
    functions += [schema.read for schema in SCHEMAS.values() if schema not in _OURS]
    return "\0".join([settings.key(), *map(_code_of, functions)])


def _code_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into an interpreter, or no plain function
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code.hex()} {code.co_names}"


def choose_schema(row: Mapping[str, Any], tokenizer: Tokenizer, settings: Settings, *, where: str) -> Schema:
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
    near = get_close_matches(name, SCHEMAS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown schema {name!r}, expected one of {', '.join(SCHEMAS)}{hint}")


def tracks(read: Read) -> bool:
    """Whether ``read`` shows, by what it looks at, which columns it reads: ours do; what a user registers may not."""
    return read in OUR_READERS or read in _WITHOUT_TEMPLATE.values() or isinstance(read, InstructReader)


@dataclass(frozen=True)
class InstructReader:
    """Rows as the template's prompt and the ``output`` (``response``, ``completion``) column, or the two answers of
    preference rows."""

    template: InstructTemplate

    def __call__(self, row: Mapping[str, Any], columns: Columns) -> Completion | Pair:
        cells: dict[str, Any] = {}
        for column in self.template.columns:
            names = INPUT if column == "input" else (column,)
            name = find(row, columns, *names) or columns.get(column, column)
            cells[name] = row.get(name)
            _refuse_structure(name, cells[name])
            columns = {**columns, column: name}
        needed = (columns[c] for c in self.template.columns if c not in self.template.optional)
        missing = next((name for name in needed if cells[name] is None), None)
        if missing is not None:
            raise BadRowError("missing column", f"no column {missing!r}, the row has {names_of(row)}")
        prompt = self.template.format(cells, columns)
        if find(row, columns, "chosen"):
            chosen, rejected = (_answer(row, columns, name) for name in ("chosen", "rejected"))
            return Pair(Completion(prompt, chosen), Completion(prompt, rejected))
        return Completion(prompt, _answer(row, columns, *OUTPUT, *COMPLETION))


def _refuse_structure(name: str, value: Any) -> None:
    """Lists and objects are not text, though they could be written as some."""
    if value is not None:
        as_text(value, name, may_be_empty=True)


def _answer(row: Mapping[str, Any], columns: Columns, *names: str) -> str:
    return as_text(cell(row, columns, *names), find(row, columns, *names) or names[0])


def _read_alpaca_as_text(row: Mapping[str, Any], columns: Columns) -> Completion | Pair:
    return InstructReader(INSTRUCT_TEMPLATES["alpaca"])(row, columns)


def _read_pair_as_text(row: Mapping[str, Any], columns: Columns) -> Completion | Pair:
    """Text answers to an instruction are written like alpaca's."""
    is_alpaca = find(row, columns, "instruction") and not optional(row, columns, "prompt")
    return _read_alpaca_as_text(row, columns) if is_alpaca else read_pair_of_texts(row, columns)


_WITHOUT_TEMPLATE: Mapping[str, Read] = {
    "alpaca": _read_alpaca_as_text,
    "preference": _read_pair_as_text,
    "prompt_completion": read_plain_completion,
}
