"""JSON values that rows contain, within limits; and errors that name the place of a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tt_data.examples import BadRowError
from tt_data.rows.data_files import data_error

MAX_DEPTH = 100  # of lists and objects in each other


def load_json(text: str) -> Any:
    """The value that is all of ``text``; of a key given twice the last one counts. Raises ValueError."""
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise _explained(error) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        refuse_deep(value)
    return value


def read_json(text: str, name: str) -> Any:
    """The value of JSON text. Raises BadRowError that names the column."""
    try:
        return load_json(text)
    except ValueError as error:
        raise BadRowError("wrong type", f"{name} is text but not JSON ({error})") from None


_DEEP = f"lists and objects more than {MAX_DEPTH} deep in each other"


def _explained(error: Exception) -> ValueError:
    if isinstance(error, RecursionError):
        return ValueError(_DEEP)
    if isinstance(error, json.JSONDecodeError):
        return error
    said = str(error).partition("; use sys")[0]  # of a number with more digits than Python reads
    return ValueError(f"{said}; write it as text" if said.startswith("Exceeds") else said)


def refuse_deep(value: Any) -> None:
    """Raise ValueError for a value deeper than ``MAX_DEPTH``."""
    if _depth(value) > MAX_DEPTH:
        raise ValueError(_DEEP)


def _depth(value: Any) -> int:
    """How deep lists and objects are in each other; just over ``MAX_DEPTH`` for what is deeper."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(item, (dict, list))
        ]
    return depth


def json_error(path: Path, line: int, error: Exception) -> ValueError:
    """The error for JSON that cannot be decoded, with its place; ``line``: where a JSONDecodeError's text begins."""
    error = _explained(error)
    if not isinstance(error, json.JSONDecodeError):
        return data_error(path, line or None, f"broken JSON ({error}){'' if ';' in str(error) else '; correct it'}")
    around = error.doc[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ").strip()
    cure = "write a row per line" if error.msg == "Extra data" else "correct it"
    place = f"{line + error.lineno - 1}:{error.colno}"
    return data_error(path, place, f"broken JSON ({error.msg}) near {around!r}; {cure}")
