"""How files of a model, a data folder or a cache are opened and written: regular, of that folder, of a known size."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from tt_data.wording import nearest

MAX_JSON_BYTES = 32 << 20  # of a config; the largest tokenizer_config.json known has 2 MB
_MANY = 2000  # names that a misspelt one is compared with
_AGAIN = "download the file again"
_HEAD = 1024
_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip
_PACKED = {
    b"\x1f\x8b": "it is compressed by gzip; unpack it",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"\xff\xfe": "it is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16 text; save it as UTF-8",
}
_NO_TEXT = {  # of a file of rows, whose name says that it is text
    b"\x1f\x8b": "this is compressed by gzip; add .gz to its name",
    b"\xff\xfe": "this is UTF-16 text, expected UTF-8; save it as UTF-8",
    b"\xfe\xff": "this is UTF-16 text, expected UTF-8; save it as UTF-8",
    b"PAR1": "this is a parquet file; call it .parquet",
    b"ARROW1": "this is an arrow file; call it .arrow",
    b"PK\x03\x04": "this is a zip archive, not rows; unpack it",
    b"\x28\xb5\x2f\xfd": "this is compressed by zstd; add .zst to its name",
    b"\xfd7zXZ\0": "this is compressed by xz; add .xz to its name",
    b"BZh": "this is compressed by bz2; add .bz2 to its name",
}
BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
_WEB_PAGE = re.compile(rb"(?is)(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]")


# ---- what is read ------------------------------------------------------------------------------------------------


def regular(path: Path, root: Path | None = None, *, any_kind: bool = False) -> Path:
    """``path``, if it is a regular file that is inside of ``root`` (its folder, unless given), links and all.

    The links of a Hugging Face cache, from a snapshot to the blobs of its repository, are followed too. A file that the
    user named may lead anywhere: pass ``path.resolve()``. ``any_kind``: it may also be a folder, or missing. Raises
    ValueError that says what it is and where it leads, or FileNotFoundError.
    """
    target = Path(os.path.realpath(path))
    folder = Path(os.path.realpath(path.parent if root is None else root))
    if not target.is_relative_to(folder) and target.parent not in _blobs(folder, target):
        raise ValueError(f"{path}: a link out of its folder, to {target}; copy what it leads to into the folder")
    if any_kind:
        return path
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        link = f"a link to {target}, which does not exist" if path.is_symlink() else "no such file"
        raise FileNotFoundError(f"{path}: {link}") from None
    if not stat.S_ISREG(mode):
        raise _irregular(path, mode)
    return path


def _blobs(root: Path, target: Path) -> tuple[Path, ...]:
    """Where the links of the snapshot ``root`` may lead: the blobs of its repository, or those that all share."""
    snapshot = next((place for place in (root, *root.parents) if place.parent.name == "snapshots"), None)
    if snapshot is None:
        return ()
    repository = snapshot.parent.parent
    return repository / "blobs", repository.parent / "blobs" / target.parent.name


def _irregular(path: Path, mode: int) -> ValueError:
    kind = next((words for is_kind, words in _KINDS.items() if is_kind(mode)), "something else")
    return ValueError(f"{path}: {kind}, expected a regular file")


def open_regular(path: Path, root: Path | None = None) -> BinaryIO:
    """The bytes of a file that ``regular`` accepts; a pipe that takes its place in between does not hang."""
    number = os.open(regular(path, root), _READ)
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            raise _irregular(path, mode)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: Path, root: Path | None = None, *, limit: int) -> bytes:
    """All of a regular file, at most ``limit`` bytes. ValueError for a git-lfs pointer or a web page in its place."""
    with open_regular(path, root) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = b"" if size > limit else stream.read(limit + 1)
    if max(size, len(data)) > limit:
        raise ValueError(f"{path}: {max(size, len(data)):,} bytes, expected at most {limit:,}; {_AGAIN}")
    if found := stand_in(data):
        raise ValueError(f"{path}: {found}")
    return data


def stand_in(data: bytes, *, text: bool = False) -> str | None:
    """What the beginning of a file says that it is instead, and the cure: a git-lfs pointer, a web page, or (if it has
    to be ``text``) something compressed or in another encoding. None if it is none of these."""
    head = data[:_HEAD].removeprefix(BOM).lstrip()
    if head.startswith(b"version https://git-lfs"):
        oid, size = re.search(rb"\noid \w+:(\w{8})", head), re.search(rb"\nsize (\d{1,18})\b", head)
        facts = [f"oid {oid[1].decode()}..." if oid else "", f"{int(size[1]):,} bytes" if size else ""]
        known = f" ({', '.join(filter(None, facts))})" if any(facts) else ""
        return f"this is a git-lfs pointer{known}, not the file; run: git lfs pull"
    if _WEB_PAGE.match(head) or (head.startswith(b"<?xml") and b"<Error>" in head):
        return f"this is a web page, not the file; {_AGAIN}, from an address that needs no login"
    return next((words for start, words in _NO_TEXT.items() if data.startswith(start)), None) if text else None


def read_text(path: Path, root: Path | None = None, *, limit: int) -> str:
    """The UTF-8 text of a regular file, without a byte order mark. ValueError says which byte is wrong."""
    return decode_text(read_bytes(path, root, limit=limit), path)


def decode_text(data: bytes, path: Path) -> str:
    """The text of ``data``, which came from ``path``: UTF-8, without a byte order mark. Raises ValueError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = next((words for start, words in _PACKED.items() if data.startswith(start)), None)
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start}, 0x{data[error.start]:02x}, on line {line}"
        raise ValueError(f"{path}: not UTF-8 text ({where}); {found or f'save it as UTF-8, or {_AGAIN}'}") from None


def read_json(path: Path, root: Path | None = None, *, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in a file. ValueError says ``file:line:column`` and what is wrong there."""
    return parse_json(read_text(path, root, limit=limit), path)


def read_object(path: Path, root: Path | None = None, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no file (a link that leads nowhere is refused, not passed over)."""
    if not os.path.lexists(path):
        return {}
    data = read_json(path, root, limit=limit)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object with keys, found {json_kind(data)}; {_AGAIN}")
    return data


def parse_json(text: str, name: str | Path) -> Any:
    """The JSON value in ``text``, which came from the file ``name``. Raises ValueError; a key may not come twice."""
    if not text.strip("\0 \t\r\n"):
        raise ValueError(f"{name}: {len(text)} bytes without any content, expected JSON; {_AGAIN}")
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip())
        near = f"near {text[max(0, error.pos - 20) : error.pos + 20].strip()!r}"
        what = f"the file ends here, after {near}: it was cut off" if cut else near
        raise ValueError(f"{name}:{error.lineno}:{error.colno}: broken JSON ({error.msg}), {what}; {_AGAIN}") from None
    except RecursionError:
        raise ValueError(f"{name}: JSON nested too deeply; {_AGAIN}") from None
    except ValueError as error:  # a key that comes twice, a number of more digits than Python reads
        raise ValueError(f"{name}: {str(error).partition(';')[0]}; correct the file, or {_AGAIN}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if seen.setdefault(key, value) != value:
                raise ValueError(f"the key {key[:80]!r} is given twice, with different values")
    return found


def json_kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


# ---- what is written ---------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Put a file in its place, whole or not at all. A link of that name is replaced, never written through."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    number = os.open(temporary, _WRITE, 0o666)
    try:
        with os.fdopen(number, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def similar_file(path: Path) -> str:
    """The end of an error about a missing ``path``: the file or folder beside it with the most similar name."""
    here = [file.name for file in islice(path.parent.iterdir(), _MANY)] if path.parent.is_dir() else []
    near = nearest(path.name[:200], here)
    return "" if near is None else f"; did you mean {path.parent / near}?"
