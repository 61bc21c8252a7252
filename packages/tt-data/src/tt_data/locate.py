"""What a ``source`` means: local files, a hub data set, or rows in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tt_data.folders import local_files
from tt_data.hub import HUB_ID, open_hub, rows_from
from tt_data.sources import READERS, Placed, file_kind, read_rows, without_nulls


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again; ``digest`` stands for their content."""

    name: str
    rows: Callable[[], Iterator[Placed]]
    digest: Callable[[], str]
    path: Path | None = None


def is_hub_id(source: object) -> bool:
    """Whether ``source`` is meant as a data set of the hub: no file here, and no name that a file would have."""
    if not isinstance(source, str) or Path(source).expanduser().exists():
        return False
    looks_local = file_kind(Path(source)) is not None or source.startswith((".", "/", "~"))
    return not looks_local and HUB_ID.fullmatch(source) is not None


def open_sources(source: Any, split: str | None = None) -> list[Source]:
    """The sources that ``source`` means. Raises FileNotFoundError or ValueError that names what is there instead."""
    if isinstance(source, (str, Path)):
        return _from_name(source, split)
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return [found for item in source for found in _from_name(item, split)]
    if isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        return [_from_rows(source)]
    raise ValueError(f"data source: expected a path, a list of paths, a hub id or rows, got {type(source).__name__}")


def _from_name(name: str | Path, split: str | None) -> list[Source]:
    if is_hub_id(name):
        return [_from_hub(str(name), split)]
    return [_from_file(file) for file in local_files(Path(name).expanduser(), split)]


def _from_file(path: Path) -> Source:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} has 0 rows (0 bytes)")
    if file_kind(path) is None:
        raise ValueError(f"{path}: unknown kind of file, expected one of {', '.join(sorted(READERS))}")
    return Source(str(path), partial(read_rows, path), partial(_file_digest, path), path)


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_rows(rows: Iterable[Any]) -> Source:
    kept = rows if hasattr(rows, "__getitem__") else list(rows)
    name, columnar = "rows", hasattr(rows, "features")  # as data sets of the datasets library are

    def placed() -> Iterator[Placed]:
        for number, row in enumerate(kept):
            if not isinstance(row, Mapping):
                raise ValueError(f"{name}:{number}: expected an object with columns, found {type(row).__name__}")
            yield number, without_nulls(row) if columnar else dict(row)

    def digest() -> str:
        total = hashlib.sha256()
        for _, row in placed():
            total.update(json.dumps(row, sort_keys=True, default=str).encode())
        return total.hexdigest()

    return Source(name, placed, digest)


def _from_hub(name: str, split: str | None) -> Source:
    found = open_hub(name, split)
    return Source(name, partial(rows_from, name, found), lambda: str(found._fingerprint))
