"""Prompts from standard input and from files, for ``tt chat`` and ``tt generate``. Mistakes name the line."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tt_cli.terminal import is_utf8, tell
from tt_train.errors import ConfigError, closest, counted

LONGEST = 1 << 20  # bytes of a prompt: a hundred pages, more than most models read
_KEYS = ("prompt", "text", "messages")
_MOST_MISTAKES = 10


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row: ``content`` is the value of ``key``, a text or the turns of a conversation."""

    line: int
    id: Any = None
    key: str = "prompt"
    content: Any


def read_prompt() -> str:
    """All of standard input."""
    return _decoded(_stdin_bytes(-1), "standard input")


def read_lines() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    number = 0
    while line := _stdin_bytes(1):
        number += 1
        if line.strip():
            yield _decoded(line, f"standard input, line {number}").rstrip("\r\n")


def read_prompts(source: str) -> list[Prompt]:
    """The prompts in a file, or of standard input if ``source`` is ``-``; ConfigError with every mistake.

    One per line: an object with ``prompt`` (or ``text``) or ``messages``, and perhaps ``id``; or plain text. A file
    named .txt is plain text, and .jsonl and .json are objects; in any other the first line decides.
    """
    name = "standard input" if source == "-" else source
    found: list[Prompt] = []
    mistakes: list[str] = []
    unused: Counter[str] = Counter()
    suffix = Path(source).suffix.lower()
    if suffix in (".csv", ".tsv"):
        raise ValueError(f'{name}: a table is not read here; write a line {{"prompt": "..."}} for each of its rows')
    is_json: bool | None = {".txt": False, ".jsonl": True, ".json": True}.get(suffix)
    for number, line in enumerate(_lines_of(source), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            text = _decoded(line, where).strip("\r\n")
            is_json = _starts_json(text) if is_json is None else is_json
            found.append(_row(text, number, where, unused) if is_json else Prompt(line=number, content=text))
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        more = len(mistakes) - _MOST_MISTAKES
        rest = [f"{name}: {counted(more, 'more line')} like these"] if more > 0 else []
        raise ConfigError(mistakes[:_MOST_MISTAKES] + rest)
    if not found:
        raise ValueError(f'{name}: no prompts; write one per line, as text or as {{"prompt": ...}}')
    for key, count in sorted(unused.items()):
        tell(f"{name}: {key!r} is not used ({count} {'row' if count == 1 else 'rows'})")
    return found


def _starts_json(text: str) -> bool:
    """Whether a file whose first line this is has objects, or a list of them, which is then a mistake with its line."""
    return text.lstrip().startswith(("{", "[{")) or text.strip() == "["


def _row(text: str, number: int, where: str, unused: Counter[str]) -> Prompt:
    if number == 1 and text.strip() in ("[", "{"):
        raise ValueError(f"{where}: JSON of several lines is not read; write each object on a line of its own")
    try:
        row = json.loads(text, object_pairs_hook=_each_key_once)
    except _TwiceError as error:
        raise ValueError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        column = error.colno
        near = text[max(0, column - 20) : column + 20]
        raise ValueError(f"{where}, column {column}: {error.msg.lower()}, near {near!r}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be read") from None
    except ValueError:  # not of JSON, but of Python's int
        raise ValueError(f"{where}: has a number of too many digits") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"prompt": "..."}}, got a {type(row).__name__}')
    keys = [key for key in _KEYS if row.get(key) is not None]
    if len(keys) != 1:
        have = " and ".join(keys) if keys else f"only {', '.join(map(repr, list(row)[:5])) or 'an empty object'}"
        near = next((f"; did you mean {one!r}?" for key in row if (one := closest(str(key), _KEYS))), "")
        raise ValueError(f"{where}: expected one of prompt, text and messages, got {have}{'' if keys else near}")
    key = keys[0]
    unused.update(str(other) for other in row if other not in (key, "id"))
    content = _turns(row[key], where) if key == "messages" else row[key]
    if key != "messages" and (not isinstance(content, str) or not content.strip()):
        raise ValueError(f"{where}: {key} must be a text that is not empty")
    if isinstance(content, str):
        check_text(content, where)
    _check_json(row.get("id"), f"{where}: id")
    return Prompt(line=number, id=row.get("id"), key="prompt" if key == "text" else key, content=content)


class _TwiceError(ValueError):
    """A key that an object has twice: Python's json would take the last."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise _TwiceError(f"{twice!r} is there twice; leave one out")
    return found


def _turns(value: Any, where: str) -> list[dict[str, Any]]:
    """The turns of a conversation that the model is to answer."""
    from tt_data.rows.conversations import read_messages

    try:
        messages = [message.to_dict() for message in read_messages(value)]
        _check_json(messages, "messages")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not messages:
        raise ValueError(f"{where}: messages is empty")
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}: the last message is the {messages[-1]['role']}'s; leave it out to have it written")
    return messages


def _lines_of(source: str) -> Iterable[bytes]:
    if source == "-":
        return iter(lambda: _stdin_bytes(1), b"")
    from tt_ckpt.files import regular
    from tt_data.files import similar_file

    try:
        path = regular(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (looked in {Path.cwd()}){similar_file(Path(source))}") from None
    return _of_file(path)


def _of_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: _limited_line(file), b"")


def _limited_line(file: BinaryIO) -> bytes:
    """A line, with one byte more than is accepted at the most; the rest of it is passed over."""
    line = file.readline(LONGEST + 1)
    rest = line
    while len(rest) == LONGEST + 1 and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST + 1)
    return line


def _stdin_bytes(lines: int) -> bytes:
    """What is there, or a line of it, with one byte more than is accepted at the most."""
    source = getattr(sys.stdin, "buffer", None)
    if source is None:  # a stand-in without bytes
        return (sys.stdin.read() if lines < 0 else sys.stdin.readline()).encode("utf-8", "surrogateescape")
    data: bytes = source.read(LONGEST + 1) if lines < 0 else _limited_line(source)
    return data


def _decoded(data: bytes, where: str) -> str:
    if len(data) > LONGEST:
        raise ValueError(f"{where}: the prompt is longer than {LONGEST >> 20} MiB; shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start + 1} (0x{data[error.start]:02x})"
        raise ValueError(f"{where}: {at} is not UTF-8; convert the text, for example with iconv") from None


def check_text(text: str, where: str) -> str:
    """``text``; ValueError if it was made of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is not UTF-8; convert the text, for example with iconv"
        ) from None
    return text


def _check_json(value: Any, where: str) -> None:
    """ValueError if ``value`` cannot be written again: NaN and infinity are not JSON, and lone surrogates not UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError:
        raise ValueError(f"{where}: NaN and infinity are not JSON; write a number, a text or null") from None
    check_text(text, where)


@contextmanager
def row_file(path: Path | None) -> Iterator[Any]:
    """A function that appends a row to a new file of JSON lines, or prints it if ``path`` is None.

    A file without a row is removed at the end, so that the same command can be given again.
    """
    if path is None:
        from tt_cli.terminal import answer

        in_ascii = not is_utf8(sys.stdout)  # another encoding has its own escapes, which JSON has not
        yield lambda row: answer(json.dumps(row, ensure_ascii=in_ascii))
        return
    from tt_ckpt.files import create

    with create(path) as file:

        def write(row: dict[str, Any]) -> None:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            file.flush()

        try:
            yield write
        finally:
            if not file.tell():
                path.unlink(missing_ok=True)
