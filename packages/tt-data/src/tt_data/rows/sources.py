"""The rows that a ``source`` means: local files, a hub data set, or rows in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tt_data.files import open_regular, stand_in
from tt_data.rows.data_files import COMPRESSED
from tt_data.rows.folders import READERS, left_out, local_files, matching, no_file, refuse_links_out, refuse_outside
from tt_data.rows.hub import DATASETS, HUB_ID, NamedDataset, Part, open_hub, rows_from
from tt_data.rows.json_files import Placed, file_kind
from tt_data.rows.json_values import refuse_deep
from tt_data.rows.tables import null_for_nan, without_nulls
from tt_data.wording import nearest, visible

NO_PART = Part()
_CHUNK, _HEAD = 1 << 20, 1024
_LONGEST = 500  # characters of the name of a file that does not exist
_WORD = re.compile(r"[^/\\*?\[]+")  # no path and no pattern
_BUILDERS = ("json", "csv", "parquet", "arrow")  # sources of the datasets library that mean: the files that are named


@dataclass(frozen=True)
class Source:
    """Rows that can be read any number of times; ``digest`` identifies their content. ``sampled_from``: the number of
    all rows, if ``rows`` gives a sample of them. ``size``: that of rows in memory, if it is known."""

    name: str
    rows: Callable[[], Iterator[Placed]]
    digest: Callable[[], str]
    path: Path | None = None
    beside: Sequence[str] = ()  # files of the same directory that are not read; of its first source only
    sampled_from: int = 0
    size: int | None = None


def is_hub_id(source: object) -> bool:
    """Whether ``source`` is a data set of the hub: there is no such file, and it does not look like a file's name."""
    if not isinstance(source, str) or HUB_ID.fullmatch(source) is None:
        return False
    return not os.path.lexists(source) and file_kind(Path(source)) is None


def open_sources(source: Any, part: Part = NO_PART) -> list[Source]:
    """The sources that ``source`` means. Raises FileNotFoundError or ValueError that names what is there instead."""
    if isinstance(source, (str, Path)):
        source = [source]
    elif not isinstance(source, (list, tuple)) or not source or not all(isinstance(s, (str, Path)) for s in source):
        if not isinstance(source, Iterable) or isinstance(source, (Mapping, bytes)):
            kind = type(source).__name__
            raise ValueError(f"data source: expected a path, a list of paths, a hub id or rows, got {kind}")
        if part.options():
            raise ValueError(f"{', '.join(part.options())}: rows in memory have no such parts; leave it out")
        return [_from_rows(source)]
    sources: list[Source] = []
    for name in source:
        if not os.path.lexists(name) and is_hub_id(name):
            sources.append(_from_hub(str(name), part))
            continue
        folder, files = _files(name, part)
        beside = left_out(folder, files) if part.data_files is None and folder.is_dir() else ()
        sources += [_from_file(file, () if number else beside) for number, file in enumerate(files)]
    return sources


def resolve_name(name: str, part: Part) -> tuple[Any, Part, NamedDataset | None]:
    """What a name means that no file here has: the place, the part and the facts of a registered data set, or the files
    that ``json`` with ``data_files`` means (as ``datasets.load_dataset`` takes local files). Else the name itself."""
    if named := DATASETS.get(name):
        return named.source, part.over(named.part), named
    files = _data_files(part) if name in _BUILDERS else []
    if not files:
        return name, part, None
    return files if part.data_dir is None else [str(Path(part.data_dir) / file) for file in files], NO_PART, None


def _absent(name: str | Path) -> Path:
    """The path that ``name`` means, although nothing has this name. Raises ValueError or FileNotFoundError if there
    cannot be one."""
    text = str(name)
    if not text.strip() or not text.isprintable() or len(text) >= _LONGEST:
        raise ValueError(
            f"data source: '{visible(text, 100)}' is not a name of a file, a folder or a data set of the hub"
        )
    if "://" in text:
        raise ValueError(
            f"{text}: an address, expected a file, a folder or a data set of the hub; {_from_address(text)}"
        )
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # of no user here
        raise FileNotFoundError(f"{text}: there is no such home folder; write the path without ~") from None
    is_word = isinstance(name, str) and _WORD.fullmatch(name) and file_kind(path) is None
    if is_word and not os.path.lexists(path):
        raise FileNotFoundError(f"{name}: no such file or folder (looked in {Path.cwd()}), {_not_a_word(text)}")
    return path


def _from_address(text: str) -> str:
    scheme, _, rest = text.partition("://")
    if scheme == "file":
        return f"give the path: {rest}"
    if scheme == "hf":
        return f"give its id: {'/'.join(rest.removeprefix('datasets/').partition('@')[0].split('/')[:2])}"
    return "download it, and give the file"


def _not_a_word(name: str) -> str:
    """The end of an error about a bare word: what it may have meant."""
    here = sorted(file.name for file in islice(Path.cwd().iterdir(), 10_000) if file.is_dir() or file_kind(file))
    near = [found for found in here if found.lower().startswith(f"{name.lower()}.")]
    found = near[0] if near else nearest(name.lower(), [*DATASETS, *here])
    hint = f"; did you mean {found}?" if found else ""
    return f"and not a registered data set ({', '.join(DATASETS)}); data sets of the hub are called org/name{hint}"


def _data_files(part: Part) -> list[str]:
    """The files or patterns that ``part`` names of its split."""
    files = part.data_files
    if isinstance(files, Mapping):
        files = files.get(part.split or "train")
        if files is None:
            raise ValueError(f"data_files: no split {part.split or 'train'!r}, expected one of {list(part.data_files)}")
    files = list(files) if isinstance(files, (list, tuple)) else [] if files is None else [files]
    wrong = [f for f in files if not isinstance(f, (str, Path)) or not str(f).isprintable() or len(str(f)) > _LONGEST]
    if wrong:
        raise ValueError(f"data_files: {visible(repr(wrong[0]), 100)} is not a name or pattern of files")
    return [str(file) for file in files]


def _files(name: str | Path, part: Part) -> tuple[Path, list[Path]]:
    """The file or folder that ``name`` means, and the files in it, of which ``part`` may choose some."""
    path = Path(name) if os.path.lexists(name) else _absent(name)
    if part.revision is not None:
        raise ValueError(f"revision: {name} is on this machine and has no revisions; only hub data sets have them")
    if path.is_file():
        if part.data_dir is not None or part.data_files is not None:
            raise ValueError(f"{', '.join(part.options())}: {name} is a file, expected a directory or a hub id")
        if part.split not in (None, "train"):  # as the datasets library calls a file that is alone
            raise ValueError(f"{path}: split {part.split!r} asked for, but it is one file and has no splits")
        return path, [path]
    if not os.path.lexists(path) and any(mark in str(path) for mark in "*?["):
        matches = matching(Path(path.anchor), str(path.relative_to(path.anchor)))
        if not matches:
            raise FileNotFoundError(f"{name}: no file with this name (looked in {Path.cwd()})")
        refuse_links_out(path, matches)
        return path, [file for match in matches for file in _files(match, Part(split=part.split))[1]]
    if not path.is_dir():
        raise no_file(path)
    files = _data_files(part)
    for file in files:
        refuse_outside("data_files", file)
    if part.data_dir is not None:
        refuse_outside("data_dir", part.data_dir)
        return _files(path / part.data_dir, replace(part, data_dir=None))
    return path, local_files(path, part.split, files)


def _from_file(path: Path, beside: Sequence[str]) -> Source:
    """Raises ValueError for an empty file, and for a git-lfs pointer or a web page in the place of data."""
    with open_regular(Path(os.path.realpath(path))) as stream:
        head = stream.read(_HEAD)
    if not head:
        raise ValueError(f"{path} has 0 rows (0 bytes); give a file with rows")
    if found := stand_in(head):
        raise ValueError(f"{path}: {found}")
    kind = file_kind(path)
    if kind is None:
        unpack = "; unpack it first" if path.suffix.lower() in COMPRESSED else ""
        raise ValueError(f"{path}: unknown kind of file, expected one of {', '.join(sorted(READERS))}{unpack}")
    name = str(path) if str(path).isprintable() else visible(str(path), 4096)
    return Source(name, partial(READERS[kind], path), partial(_file_digest, path), path, beside)


def _file_digest(path: Path) -> str:
    with open_regular(Path(os.path.realpath(path))) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def quick_digest(path: Path) -> str:
    """A digest of a file's size, time, beginning and end: quick for a large file, too."""
    facts = path.stat()
    digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
    with open_regular(Path(os.path.realpath(path))) as stream:
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
            try:
                refuse_deep(row)
            except ValueError as error:
                raise ValueError(f"{self.name}:{number}: {error}") from None
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
    return Source(kept.name, kept.placed, kept.digest, size=_size(kept.kept))


def _from_hub(name: str, part: Part) -> Source:
    found = open_hub(name, part)
    return Source(
        name, partial(rows_from, name, found), partial(getattr, found, "_fingerprint"), size=_size(found)
    )  # fmt: skip


def _size(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None
