"""How the files of an adapter folder are opened and written: regular, inside the folder, never through a link."""

import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from tt_peft.shown import plain, shown

CONFIG_BYTES = 64 << 20  # full names of every expert of the largest models are some 10 MB
HEADER_BYTES = 25_000_000  # the hub's own limit for the header of a safetensors file
_AGAIN = "download it again"
_WEB_PAGE = re.compile(rb"(?is)(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def regular(path: str | Path, root: str | Path | None = None) -> Path:
    """``path`` if it is a regular file inside ``root`` (default: its folder), or in the blobs of its hub repository.

    FileNotFoundError if there is nothing; ValueError for a link that leads elsewhere, a pipe or a device.
    """
    path = Path(path)
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent if root is None else root))
    if not target.is_relative_to(home) and not _is_cached(target, home):
        raise ValueError(f"{plain(path)}: a link out of its folder, to {plain(target)}; copy the file into the folder")
    try:
        kind = stat.S_IFMT(target.stat().st_mode)
    except FileNotFoundError:
        link = f"a link to {plain(target)}, which does not exist; remove it, or copy the file there"
        raise FileNotFoundError(f"{plain(path)}: {link if path.is_symlink() else 'no such file'}") from None
    if kind != stat.S_IFREG:
        raise ValueError(f"{plain(path)}: {_KINDS.get(kind, 'a special file')}, not a regular file; put the file there")
    return path


def _is_cached(target: Path, home: Path) -> bool:
    """``models--org--name/snapshots/<revision>/file -> ../../blobs/<hash>``, or the blobs that repositories share."""
    for folder in (home, *home.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and "--" in repository.name:
            shared = repository.parent / "blobs" / target.parent.name
            return target.parent in (repository / "blobs", shared)
    return False


def read_start(path: str | Path, root: str | Path | None = None) -> bytes:
    """The first bytes of a regular file; ValueError if it is empty or a placeholder: a git-lfs pointer, a web page."""
    with regular(path, root).open("rb") as file:
        start = file.read(1024)
    if not start:
        raise ValueError(f"{plain(path)}: 0 bytes; {_AGAIN}, or save the adapter again")
    _refuse_placeholder(path, start)
    return start


def _refuse_placeholder(path: str | Path, start: bytes) -> None:
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,15})\b", head)
        what = f" of {int(size[1]):,} bytes" if size else ""
        raise ValueError(f"{plain(path)}: a git-lfs pointer to a file{what}, not the file itself; run: git lfs pull")
    if _WEB_PAGE.match(head) or (head.startswith(b"<?xml") and b"<Error>" in head):
        raise ValueError(
            f"{plain(path)}: a web page, not the file itself; log in if the repository asks for it, and {_AGAIN}"
        )


def read_json(path: str | Path, root: str | Path | None = None, *, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file; a ValueError says ``file:line:column``. A key has one value."""
    path = Path(path)
    with regular(path, root).open("rb") as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise ValueError(f"{plain(path)}: {path.stat().st_size:,} bytes, expected at most {limit:,}; {_AGAIN}")
    read_start(path, root)
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unambiguous)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{plain(path)}:{line}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{plain(path)}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}); {_AGAIN}"
        ) from None
    except RecursionError:
        raise ValueError(f"{plain(path)}: not valid JSON: nested too deeply; {_AGAIN}") from None
    except ValueError as error:  # a key that appears twice, a number of more digits than Python reads
        raise ValueError(f"{plain(path)}: not valid JSON: {str(error).partition(';')[0]}; {_AGAIN}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{plain(path)}: expected a JSON object, found {shown(value)}; {_AGAIN}")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next((key for key, value in pairs if found[key] != value), None)
        if twice is not None:
            raise ValueError(f"{shown(twice)} is given twice, with different values")
    return found


def write(path: Path, content: bytes) -> None:
    """Replace the file in one step: after a crash there is the old one or the new one. A link is not followed."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{plain(path)}: a folder is there; remove it, or choose another folder")
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "wb", opener=lambda name, _: os.open(name, _WRITE, 0o644)) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
