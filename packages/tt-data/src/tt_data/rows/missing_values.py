"""What is missing in a row, as columnar files and pandas write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a columnar file, whose objects all have the same keys, as it was before: a key that an object below the
    columns has no value for was not there (an argument that only another tool takes). NaN is null."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else null_for_nan(value)


def null_for_nan(value: Any) -> Any:
    """``value`` with None for every NaN in it, which is how pandas writes what is missing."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    return [null_for_nan(item) for item in value] if isinstance(value, list) else value
