"""The readers of data files, and the data files that a directory or one of its splits contains.

A file apart from ``sources``: most readers never need the rules of folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from tt_data.files import regular, similar_file
from tt_data.rows.data_files import COMPRESSED, data_error
from tt_data.rows.json_files import Placed, file_kind, read_json, read_jsonl
from tt_data.rows.tables import read_arrow, read_csv, read_parquet
from tt_data.wording import did_you_mean, visible

_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_MOST = 100_000  # files in a directory


READERS: Mapping[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def read_rows(path: Path) -> Iterator[Placed]:
    """The rows of one file. Raises ValueError with file:line:column for what cannot be read."""
    kind = file_kind(path)
    if kind is None:
        raise data_error(path, None, f"unknown kind of file, expected one of {', '.join(sorted(READERS))}")
    return READERS[kind](path)


def local_files(path: Path, split: str | None = None, data_files: Sequence[str] = ()) -> list[Path]:
    """The data files in a directory, of its ``split``, or only ``data_files`` (names or patterns). Raises
    FileNotFoundError or ValueError."""
    files = _matching(path, data_files) if data_files else [file for file in _inside(path) if file_kind(file)]
    files = [file for file in files if data_files or not _is_hidden(file.relative_to(path))]
    for file in files:
        _refuse_link_out(file, path)
    if not data_files:
        _refuse_compressed(path)
    if not files:
        raise ValueError(f"{path}: no data file in this directory, expected one of {', '.join(sorted(READERS))}")
    if split is None and not data_files:
        split = _main_split(path, files)
    return files if split is None or data_files else _of_split(path, files, split)


def no_file(path: Path) -> Exception:
    """The error for a path that the user named and that is neither a directory nor a regular file."""
    if path.is_symlink() and not path.exists():
        return FileNotFoundError(f"{path}: a link to {path.readlink()}, which is not there")
    if not path.exists():
        windows = "; a path is written with / here" if "\\" in str(path) else ""
        return FileNotFoundError(f"{path}: no such file (looked in {Path.cwd()}){windows or similar_file(path)}")
    if path.is_fifo():
        return ValueError(
            f"{path}: a pipe, which can be read only once; write it into a file first: cat {path} > rows.jsonl"
        )
    target = Path(os.path.realpath(path))
    try:
        regular(target)
    except ValueError as error:
        return ValueError(f"{path}{str(error).removeprefix(str(target))}")
    return ValueError(f"{path}: it changed while it was looked at; try again")


def left_out(path: Path, files: Sequence[Path]) -> list[str]:
    """The files in a directory that are not among ``files``. Hidden files count only if they could hold rows."""
    return [
        str(file)
        for file in _inside(path)
        if file not in files and (file_kind(file) or not _is_hidden(file.relative_to(path)))
    ]


def _inside(path: Path) -> list[Path]:
    """All entries of a directory and its folders, except hidden folders and files that describe the data set. Links to
    folders are listed but not entered."""
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder) / name for name in (*names, *links) if name not in _NO_ROWS]
        if len(found) > _MOST:
            raise ValueError(f"{path}: more than {_MOST:,} files in this directory; name the folder with the rows")
    return sorted(found)


def matching(path: Path, pattern: str) -> list[Path]:
    """The files and folders that a pattern means in a folder. Raises ValueError if it is not a pattern."""
    try:
        return sorted(path.glob(pattern))
    except (ValueError, NotImplementedError, IndexError, re.error) as error:
        raise ValueError(f"{path}: not a pattern of files: {pattern!r} ({error}); such as data/*.jsonl") from None


def refuse_links_out(pattern: Path, matches: Sequence[Path]) -> None:
    """Raise ValueError for a match of ``pattern`` that leads out of the folder that the user typed."""
    typed = list(takewhile(lambda part: not any(mark in part for mark in "*?["), pattern.parts))
    for match in matches:
        if not match.is_dir() or match.is_symlink():
            _refuse_link_out(match, Path(*typed), is_file=not match.is_dir())


def _refuse_link_out(path: Path, root: Path, *, is_file: bool = True) -> None:
    try:
        regular(path, root, any_kind=not is_file)
    except ValueError as error:
        named = "; or list it by its own name in data.train" if "a link out of" in str(error) else ""
        raise ValueError(f"{error}{named}") from None


def refuse_outside(key: str, name: str) -> None:
    """Raise ValueError for a name or pattern that may lead out of the folder that it is in."""
    if (
        not isinstance(name, str)
        or Path(name).is_absolute()
        or ".." in Path(name).parts
        or "://" in name
        or "\0" in name
    ):
        raise ValueError(
            f"{key}: {visible(repr(name), 100)} is not inside the data set's folder; give its own path as data.train"
        )


def _matching(path: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that each of ``patterns`` means."""
    found: list[Path] = []
    for pattern in patterns:
        matches = [file for file in matching(path, pattern) if not file.is_dir()] if pattern else []
        if not matches:
            raise FileNotFoundError(f"{path}: no file {pattern!r} in it{similar_file(path / pattern)}")
        found += matches
    return found


def _main_split(path: Path, files: Sequence[Path]) -> str | None:
    """``train`` if there are others to hold out, None if the files are not of splits."""
    names = {_split_of(file.relative_to(path)) for file in files}
    return "train" if "train" in names and names & {"test", "eval", "dev", "valid", "validation"} else None


def _refuse_compressed(path: Path) -> None:
    """Rows that cannot be unpacked here are part of the data: reading on without them would be silent."""
    for file in _inside(path):
        if file.suffix.lower() in COMPRESSED and file_kind(Path(file.stem)) and not file_kind(file):
            raise ValueError(f"{file}: compressed in a way that is not read; unpack it, or list the files to read")


def _is_hidden(file: Path) -> bool:
    return file.name.startswith("_") or any(part.startswith(".") for part in file.parts)


def _of_split(path: Path, files: list[Path], split: str) -> list[Path]:
    names = {file: _split_of(file.relative_to(path)) for file in files}
    chosen = [file for file, name in names.items() if name == split]
    if not chosen:
        known = sorted({name for name in names.values() if name})
        hint = did_you_mean(split, known)
        raise ValueError(f"{path}: no split {split!r}, expected one of {known or 'no splits here'}{hint}")
    return chosen


def _split_of(file: Path) -> str:
    """``train`` for train.jsonl, train-00000-of-00002.parquet and train/x.jsonl."""
    parts = [part.lower() for part in file.parts]
    return parts[0] if len(parts) > 1 and parts[0] != "data" else parts[-1].split(".")[0].split("-0")[0]
