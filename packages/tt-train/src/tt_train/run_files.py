"""The files of a run directory, as they are read: anybody may have made them, and a run may have been killed.

Every file is a regular one inside the directory (tt_ckpt.files), of a size that a run gives it.
"""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tt_ckpt import files
from tt_ckpt.shown import plain, quoted

NUMBERS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_gib", "elapsed_s", "eval_loss")
CURE = "restore it from a copy, or start a new run"
_LINE_BYTES = 4_000_000
_ROWS_BYTES = 2_000_000_000
_LAST_STEP = 1 << 53
_DEPTH = 50
_LARGEST = 1e100

# what the keys of manifest.json that are read again must be, if they are there; the rest is only shown
_MANIFEST: dict[str, type] = {
    **dict.fromkeys(("state", "extension", "recipe", "method", "base_model", "wandb_id"), str),
    **dict.fromkeys(("config.model.path", "config.model.tokenizer", "config.model.dtype", "config.data.template"), str),
    **dict.fromkeys(("config", "config.model", "config.adapter", "config.data", "imports", "summary"), dict),
    **dict.fromkeys(("data", "data.report"), dict),
    "summary.steps": int,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; ValueError names the file if it is none."""
    value = files.read_json(path, cure=CURE)
    if not isinstance(value, dict):
        raise ValueError(f"{plain(path)}: expected a JSON object, found {type(value).__name__}; {CURE}")
    if not is_plain(value):
        raise ValueError(f"{plain(path)}: nested too deeply; {CURE}")
    return value


def is_plain(value: Any) -> bool:
    """Whether a value of a file can be written again: not nested without end, no number of thousands of digits."""
    level = [value]
    for _ in range(_DEPTH):
        if not level:
            return True
        if any(isinstance(item, int) and item.bit_length() > 10_000 for item in level):
            return False
        level = [child for item in level for child in _children(item)]
    return False


def _children(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def own_folder(run: Path, name: str) -> Path:
    """The path of a folder of a run, which need not be there; ValueError if it is a link out of the run."""
    path = run / name
    if os.path.lexists(path):
        files.inside(path)
    return path


def read_manifest(run: Path) -> dict[str, Any]:
    """manifest.json of a run; ValueError names the key that is not what a run writes there."""
    manifest = read_json(run / "manifest.json")
    for dotted, kind in _MANIFEST.items():
        value: Any = manifest
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and type(value) is not kind:
            found = f"expected {_KINDS[kind]}, found {quoted(value)}"
            raise ValueError(f"{plain(run / 'manifest.json')}: {dotted}: {found}; {CURE}")
    return manifest


_KINDS = {str: "a text", dict: "an object", int: "a whole number"}


def json_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` file, none if there is no file; a line that is none is left out, with why."""
    if not os.path.lexists(path):
        return
    with files.regular(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size > _ROWS_BYTES:
            raise ValueError(f"{plain(path)}: more than {_ROWS_BYTES:,} bytes, which no run writes; {CURE}")
        number = 0
        while line := file.readline(_LINE_BYTES):
            number, whole = number + 1, len(line) < _LINE_BYTES
            while len(line) == _LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(_LINE_BYTES)
            try:
                record = json.loads(line) if whole else None
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and is_plain(record):
                yield record
            elif line.strip() or not whole:
                is_last = not file.peek(1)
                where = "the last line, cut when the run was stopped" if is_last else "not a JSON object"
                problems.append(f"{path.name}:{number}: left out ({where})")


def read_rows(path: Path, problems: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl or samples.jsonl: ``step`` is a whole number, a figure is finite or None."""
    told = [] if problems is None else problems
    for row in json_lines(path, told):
        step = row.get("step")
        if type(step) is not int or not 0 <= step < _LAST_STEP:
            told.append(f"{path.name}: a row left out (its step is {quoted(step)})")
            continue
        for key in NUMBERS:
            value = row.get(key)
            if value is not None and number(value) is None:
                told.append(f"step {step}: {key} was {quoted(value)}")
                row[key] = None
        yield row


def number(value: Any) -> float | None:
    """A finite number of a size that can be drawn; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _LARGEST else None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file (a write to a full disk) names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def typed(path: str | Path) -> str:
    """A path as one would type it for a program: quoted if it must be, and no option if it begins with a dash."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
