"""What a ``source`` means: local files, a hub data set, or rows in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tt_data.compressed import compression, is_unread
from tt_data.folders import left_out, local_files
from tt_data.hub import HUB_ID, Part, open_hub, rows_from
from tt_data.nulls import null_for_nan, without_nulls
from tt_data.sources import READERS, Placed, file_kind, read_rows

NO_PART = Part()
_CHUNK = 1 << 20
_BUILDERS = ("json", "csv", "parquet", "arrow")  # sources of the datasets library that mean: the files that are named


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


def open_sources(source: Any, part: Part = NO_PART) -> list[Source]:
    """The sources that ``source`` means. Raises FileNotFoundError or ValueError that names what is there instead."""
    if isinstance(source, (str, Path)):
        return _from_name(source, part)
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return [found for item in source for found in _from_name(item, part)]
    if isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        if part.options():
            raise ValueError(f"{', '.join(part.options())}: rows in memory have no such parts; leave it out")
        return [_from_rows(source)]
    raise ValueError(f"data source: expected a path, a list of paths, a hub id or rows, got {type(source).__name__}")


def as_files(source: Any, part: Part) -> tuple[Any, Part]:
    """``json`` with ``data_files`` (as ``datasets.load_dataset`` takes local files) as these files."""
    files = part.data_files
    if isinstance(files, Mapping):
        files = files.get(part.split or "train")
    files = [files] if isinstance(files, (str, Path)) else list(files or ())
    if not isinstance(source, str) or source not in _BUILDERS or not files or Path(source).exists():
        return source, part
    if any("://" in str(file) for file in files):
        return source, part
    return [Path(part.data_dir or "") / file for file in files], Part()


def files_left_out(source: Any, part: Part) -> list[str]:
    """The files in the directories of ``source`` that are not read."""
    left: list[str] = []
    if part.data_files is not None:  # the others are not meant
        return left
    for item in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(item, (str, Path)) and not is_hub_id(item):
            folder = _folder(item, part)
            left += left_out(folder, _files(item, part)) if folder.is_dir() else []
    return left


def _from_name(name: str | Path, part: Part) -> list[Source]:
    if is_hub_id(name):
        return [_from_hub(str(name), part)]
    return [_from_file(file) for file in _files(name, part)]


def _folder(name: str | Path, part: Part) -> Path:
    return Path(name).expanduser() / (part.data_dir or "")


def _files(name: str | Path, part: Part) -> list[Path]:
    """The local files of ``name``, of which ``part`` may choose some."""
    path = Path(name).expanduser()
    if part.revision is not None:
        raise ValueError(f"revision: {name} is on this machine, where it has one state; revisions are of hub data sets")
    if not path.exists() and any(mark in str(path) for mark in "*?["):
        matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise FileNotFoundError(f"{name}: no file of such a name (looked from {Path.cwd()})")
        return [file for match in matches for file in local_files(match, part.split)]
    if path.is_file() and part.options():
        raise ValueError(f"{', '.join(part.options())}: {name} is a file, expected a directory or a hub id")
    files = part.data_files
    if isinstance(files, Mapping):
        files = files.get(part.split or "train")
        if files is None:
            raise ValueError(f"data_files: no split {part.split or 'train'!r}, expected one of {list(part.data_files)}")
    return local_files(_folder(name, part), part.split, [files] if isinstance(files, str) else list(files or ()))


def _from_file(path: Path) -> Source:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} has 0 rows (0 bytes)")
    if file_kind(path) is None:
        unpack = "; unpack it first" if is_unread(path) or compression(path) else ""
        raise ValueError(f"{path}: unknown kind of file, expected one of {', '.join(sorted(READERS))}{unpack}")
    return Source(str(path), partial(read_rows, path), partial(_file_digest, path), path)


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def quick_digest(path: Path) -> str:
    """A stand-in for the content of a file too large to read: its size, time, beginning and end."""
    facts = path.stat()
    digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_CHUNK))
        stream.seek(max(0, facts.st_size - _CHUNK))
        digest.update(stream.read(_CHUNK))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Rows:
    """Rows in memory. A class, so that a stream over them can be sent to another process."""

    kept: Any
    columnar: bool  # as data sets of the datasets library are
    name: str = "rows"

    def placed(self) -> Iterator[Placed]:
        for number, row in enumerate(self.kept):
            if not isinstance(row, Mapping):
                raise ValueError(f"{self.name}:{number}: expected an object with columns, found {type(row).__name__}")
            yield number, without_nulls(row) if self.columnar else null_for_nan(dict(row))

    def digest(self) -> str:
        total = hashlib.sha256()
        for _, row in self.placed():
            total.update(json.dumps(row, sort_keys=True, default=str).encode())
        return total.hexdigest()


def _from_rows(rows: Iterable[Any]) -> Source:
    if hasattr(rows, "iterrows"):  # a DataFrame would give the names of its columns
        rows = rows.to_dict("records")  # type: ignore[attr-defined]
    kept = _Rows(rows if hasattr(rows, "__getitem__") else list(rows), hasattr(rows, "features"))
    return Source(kept.name, kept.placed, kept.digest)


def _from_hub(name: str, part: Part) -> Source:
    found = open_hub(name, part)
    return Source(name, partial(rows_from, name, found), partial(getattr, found, "_fingerprint"))
