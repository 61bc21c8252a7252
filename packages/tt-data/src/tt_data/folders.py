"""Which files a path means: the file, or those of a directory and one of its splits."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from tt_data.sources import READERS, file_kind

_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def local_files(path: Path, split: str | None) -> list[Path]:
    """The data files that ``path`` (a file or a directory) means. Raises FileNotFoundError or ValueError."""
    if path.is_file():
        return [path]
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path}: a link to {path.readlink()}, which is not there")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()}){_near_file(path)}")
    files = sorted(p for p in path.rglob("*") if file_kind(p) and p.is_file() and not _is_hidden(p.relative_to(path)))
    files = [p for p in files if p.name not in _NO_ROWS]
    for file in files:
        _refuse_escape(path, file)
    if not files:
        raise ValueError(f"{path}: no data file in this directory, expected one of {', '.join(sorted(READERS))}")
    names = {_split_of(file.relative_to(path)) for file in files}
    if split is None and "train" in names and names & {"test", "eval", "dev", "valid", "validation"}:
        split = "train"
    return files if split is None else _of_split(path, files, split)


def _is_hidden(file: Path) -> bool:
    return file.name.startswith("_") or any(part.startswith(".") for part in file.parts)


def _refuse_escape(directory: Path, file: Path) -> None:
    """A folder from somewhere else must not make us read what lies beside it. The hub's cache links to its blobs."""
    target, root = file.resolve(), directory.resolve()
    blobs = next((parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots"), root)
    if file.is_symlink() and not target.is_relative_to(root) and not target.is_relative_to(blobs):
        raise ValueError(f"{file}: a link out of this directory, to {target}; name that file itself to read it")


def _of_split(path: Path, files: list[Path], split: str) -> list[Path]:
    names = {file: _split_of(file.relative_to(path)) for file in files}
    chosen = [file for file, name in names.items() if name == split]
    if not chosen:
        known = sorted({name for name in names.values() if name})
        near = get_close_matches(split, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path}: no split {split!r}, expected one of {known or 'no splits here'}{hint}")
    return chosen


def _split_of(file: Path) -> str:
    """``train`` for train.jsonl, train-00000-of-00002.parquet and train/x.jsonl."""
    parts = [part.lower() for part in file.parts]
    return parts[0] if len(parts) > 1 and parts[0] != "data" else parts[-1].split(".")[0].split("-0")[0]


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
