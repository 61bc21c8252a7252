"""Reading the files of a run directory. Anybody may have written them, and the run may have been killed.

Every file must be a regular file inside the directory (tt_ckpt.files), and no larger than a run writes it.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tt_ckpt import files
from tt_ckpt.shown import plain, quoted
from tt_train.records.problems import Problems
from tt_train.records.series import SERIES

if TYPE_CHECKING:
    from tt_train.config import RunConfig

MARKER = "config.yaml"
TEMPLATE_FILE = "chat_template.jinja"
CURE = "restore it from a copy, or start a new run"
_CONFIG_BYTES = 500_000
_LINE_BYTES = 4_000_000
_ROWS_BYTES = 2_000_000_000
LAST_STEP = 1 << 53
_DEPTH = 50
_LARGEST = 1e100

# types of the keys of manifest.json that are used again; the others are only shown
_MANIFEST: dict[str, type] = {
    **dict.fromkeys(("state", "extension", "recipe", "method", "base_model"), str),
    **dict.fromkeys(("wandb_id", "mlflow_id", "comet_id"), str),
    **dict.fromkeys(("config.model.path", "config.model.tokenizer", "config.model.dtype", "config.data.template"), str),
    **dict.fromkeys(("config", "config.model", "config.adapter", "config.data", "imports", "summary"), dict),
    **dict.fromkeys(("data", "data.report"), dict),
    **dict.fromkeys(("summary.steps", "steps_total"), int),
    "best": dict,
    **dict.fromkeys(("serving", "serving.files"), dict),
    **dict.fromkeys(("serving.vocab_size", "serving.bos_id", "serving.eos_id"), int),
    "serving.digest": str,
}


@dataclass(frozen=True)
class FinishedRun:
    """A run directory and what its files say: its config, base, result and checkpoints. The run may be unfinished.

    A file is read when it is needed. ValueError names a file that is not as a run writes it.
    """

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> "FinishedRun | None":
        """The run directory at ``path``; None if it is not one."""
        return cls(Path(path)) if is_run(Path(path)) else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config as plain data, with secrets blanked, from the copy in manifest.json."""
        found: dict[str, Any] = self.manifest.get("config") or {}
        return found

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config such as ``model``; {} if the config does not have it."""
        found: dict[str, Any] = self.config.get(name) or {}
        return found

    def config_file(self) -> dict[str, Any]:
        """The values of config.yaml, unchecked, to be shown. Raises ValueError if it is not a mapping."""
        try:
            values = yaml.load(files.read_text(self.path / MARKER, limit=_CONFIG_BYTES), _PlainLoader)  # noqa: S506
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping, found {type(values).__name__}")
        if not is_plain(values):
            raise ValueError("not the values of a config")
        return {str(key): value for key, value in values.items()}

    def compose(self, *overrides: str) -> "RunConfig":
        """config.yaml with ``overrides``, checked, without keys that a recipe file added. Raises ConfigError."""
        from tt_train.settings.composing import compose_run

        return compose_run(self.path, overrides)

    @property
    def data_report(self) -> dict[str, Any]:
        """The report on the rows that the run was trained on."""
        found: dict[str, Any] = (self.manifest.get("data") or {}).get("report") or {}
        return found

    @property
    def template(self) -> str | None:
        """The template of its rows, for ``tt_data.choose_template``: the saved file, or the name in its config."""
        if (self.path / TEMPLATE_FILE).is_file():
            return str(self.path / TEMPLATE_FILE)
        name = self.section("data").get("template")
        return None if name is None else str(name)

    @property
    def adapter(self) -> Path | None:
        """The adapter that the run trained; None if it trained a whole model, or has no result yet."""
        folder = own_folder(self.path, "adapter")
        return folder if (folder / "adapter_config.json").is_file() else None

    @property
    def model(self) -> Path | None:
        """The whole model that the run trained; None if it trained an adapter, or has no result yet."""
        folder = own_folder(self.path, "model")
        return folder if (folder / "config.json").is_file() else None

    @property
    def checkpoints(self) -> Path:
        return own_folder(self.path, "checkpoints")


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: a resolved config has none, and a few lines of them can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        return super().compose_node(parent, index)


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory."""
    return (path / MARKER).is_file() and (path / "manifest.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; ValueError names the file if it is anything else."""
    value = files.read_json(path, cure=CURE)
    if not isinstance(value, dict):
        raise ValueError(f"{plain(path)}: expected a JSON object, found {type(value).__name__}; {CURE}")
    if not is_plain(value):
        raise ValueError(f"{plain(path)}: nested too deeply; {CURE}")
    return value


def is_plain(value: Any) -> bool:
    """Whether a value of a file can be written again: neither nested too deeply nor a number of thousands of digits."""
    level, below = [value], list[Any]()
    for _ in range(_DEPTH - 1):
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, int) and item.bit_length() > 10_000:
                return False
        if not below:
            return True
        level, below = below, []
    return False


def own_folder(run: Path, name: str) -> Path:
    """The path of a folder of a run, whether or not it exists; ValueError if it is a link out of the run."""
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


def json_lines(
    path: Path, problems: list[str], *, last_bytes: int | None = None, key: str | int | None = None
) -> Iterator[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` file, if it exists. Any other line is left out, and ``problems`` says why.

    last_bytes: of a larger file, the whole lines in its last bytes only; lines are then counted from there.
    key: only lines that contain this key, or number. The others are not parsed, which takes a twentieth of the time.
    """
    mark = b"" if key is None else json.dumps(key).encode()
    for number, line, is_last in raw_lines(path, last_bytes=last_bytes):
        if line is not None and mark not in line:
            continue
        if (record := record_of(line)) is not None:
            yield record
        elif line is None or line.strip():
            problems.append(left_out(path.name, number, is_last=is_last()))


def raw_lines(path: Path, *, last_bytes: int | None = None) -> Iterator[tuple[int, bytes | None, Callable[[], bool]]]:
    """The number of each line, the line, and whether it is the last one; None for a line that is too long.

    last_bytes: see ``json_lines``.
    """
    if not os.path.lexists(path):
        return
    with files.regular(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size > _ROWS_BYTES:
            raise ValueError(f"{plain(path)}: more than {_ROWS_BYTES:,} bytes, which no run writes; {CURE}")
        if last_bytes is not None and os.fstat(file.fileno()).st_size > last_bytes:
            file.seek(-last_bytes - 1, os.SEEK_END)
            file.readline(last_bytes)  # the rest of a line, or the end of the one before
        number = 0

        def is_last() -> bool:
            return not file.peek(1)

        while line := file.readline(_LINE_BYTES):
            number, whole = number + 1, len(line) < _LINE_BYTES
            while len(line) == _LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(_LINE_BYTES)
            yield number, line if whole else None, is_last


def record_of(line: bytes | None) -> dict[str, Any] | None:
    """The JSON object that a line is; None if it is anything else."""
    try:
        record = None if line is None else json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and is_plain(record) else None


def left_out(name: str, number: int, *, is_last: bool) -> str:
    """What is said of a line that is not a record."""
    where = "the last line, cut when the run was stopped" if is_last else "not a JSON object"
    return f"{name}:{number}: left out ({where})"


def read_rows(
    path: Path, problems: list[str] | None = None, *, last_bytes: int | None = None, key: str | int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl or samples.jsonl: ``step`` is a whole number, a figure is finite or None.

    last_bytes, key: see ``json_lines``.
    """
    told = Problems() if problems is None else problems
    for record in json_lines(path, told, last_bytes=last_bytes, key=key):
        if (row := checked_row(record, path.name, told)) is not None:
            yield row


def checked_row(row: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any] | None:
    """``row`` with None for figures that are not numbers; None if its step is not one. ``problems`` says which."""
    step = row.get("step")
    if type(step) is not int or not 0 <= step < LAST_STEP:
        problems.append(f"{name}: a row left out (its step is {quoted(step)})")
        return None
    for key in SERIES:
        value = row.get(key)
        if value is not None and number(value) is None:
            problems.append(f"step {step}: {key} was {quoted(value)}")
            row[key] = None
    return row


def number(value: Any) -> float | None:
    """``value`` if it is a finite number that can be drawn, else None."""
    if type(value) is float and -_LARGEST < value < _LARGEST:  # nearly every one of a run's
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _LARGEST else None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add ``path`` to an OSError that does not name a file (a write to a full disk)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
