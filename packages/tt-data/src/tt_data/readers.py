"""How the rows of a source are read: by the schema of their columns, or by a named template."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any

from tt_data.builtin_templates import CHAT_TEMPLATES, with_named_template
from tt_data.converters import SCHEMAS, Columns, Schema, detect_schema
from tt_data.examples import BadRowError, Completion, Example, Pair
from tt_data.instruct_templates import INSTRUCT_TEMPLATES, InstructTemplate
from tt_data.settings import Settings
from tt_data.tokenizer import Tokenizer

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


def choose_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """``tokenizer`` with the chat template of that name; instruct templates change rows, not the tokenizer."""
    if template is None or template in INSTRUCT_TEMPLATES:
        return tokenizer
    try:
        return with_named_template(tokenizer, template)
    except ValueError as error:
        raise ValueError(str(error).replace(" or a .jinja", f", {', '.join(INSTRUCT_TEMPLATES)} or a .jinja")) from None


def choose_schema(row: Mapping[str, Any], tokenizer: Tokenizer, settings: Settings, *, where: str) -> Schema:
    """The schema of a source, from its first row: what the settings name, else what its columns are.

    Instruction rows of a model without a chat template are written with the alpaca template. Raises ValueError.
    """
    if settings.template in INSTRUCT_TEMPLATES:
        template = INSTRUCT_TEMPLATES[settings.template]
        return Schema(f"instruct:{settings.template}", (), instruct_reader(template))
    if settings.schema is not None:
        schema = _named_schema(settings.schema)
    else:
        schema = detect_schema(row, settings.columns, where=where)
    if schema.name == "alpaca" and not tokenizer.has_chat_template:
        return Schema("alpaca", schema.columns, instruct_reader(INSTRUCT_TEMPLATES["alpaca"]))
    if schema.name in _NEED_TEMPLATE and not tokenizer.has_chat_template:
        raise ValueError(
            f"{where}: {schema.name} rows need a chat template and this model has none; "
            f"name one with template=... ({', '.join(CHAT_TEMPLATES)})"
        )
    return schema


def _named_schema(name: str) -> Schema:
    if name in SCHEMAS:
        return SCHEMAS[name]
    near = get_close_matches(name, SCHEMAS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown schema {name!r}, expected one of {', '.join(SCHEMAS)}{hint}")


def instruct_reader(template: InstructTemplate) -> Read:
    """Rows as the template's prompt and the ``output`` (``response``, ``completion``) column, or the two answers of
    preference rows."""

    def read(row: Mapping[str, Any], columns: Columns) -> Completion | Pair:
        for column in template.columns:
            _refuse_structure(columns.get(column, column), row.get(columns.get(column, column)))
        try:
            prompt = template.format(row, columns)
        except ValueError as error:
            raise BadRowError("missing column", str(error)) from None
        if columns.get("chosen", "chosen") in row:
            answers = [_answer(row, columns, (name,)) for name in ("chosen", "rejected")]
            return Pair(Completion(prompt, answers[0]), Completion(prompt, answers[1]))
        return Completion(prompt, _answer(row, columns, ("output", "response", "completion")))

    return read


def _refuse_structure(name: str, value: Any) -> None:
    """Lists and objects are no text, though they could be written as some; nor is NaN, which pandas writes for null."""
    if isinstance(value, float) and not isfinite(value):
        raise BadRowError("null", f"column {name!r} is {value}")
    if value is not None and not isinstance(value, (str, int, float)):
        raise BadRowError("wrong type", f"column {name!r} holds {type(value).__name__}, expected text")


def _answer(row: Mapping[str, Any], columns: Columns, names: tuple[str, ...]) -> str:
    mapped = [columns.get(name, name) for name in names]
    name = next((name for name in mapped if name in row), None)
    if name is None:
        raise BadRowError(
            "missing column", f"no column {mapped[0]!r}, the row has {', '.join(map(repr, row)) or 'none'}"
        )
    if row[name] is None:
        raise BadRowError("null", f"column {name!r} is null")
    _refuse_structure(name, row[name])
    if not str(row[name]).strip():
        raise BadRowError("empty", f"column {name!r} is empty")
    return str(row[name])
