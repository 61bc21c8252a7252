"""How the files of a model folder or run directory are read and written: one rule, in one place.

Reading: only regular files inside their folder. A link must stay inside it or belong to the hub's cache. Pipes, devices
and sockets are refused before they are opened, and what an accident leaves in the place of a file (a git-lfs pointer, a
web page) by its first bytes. Writing: a new temporary file beside the target, then a rename, so that nothing is written
through a link. A folder that the user names may itself be a link. Somebody who can swap a folder for a link between the
check and the opening is not stopped: they own the folder.
"""

import errno
import json
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from tt_ckpt.shown import format_size, plain, quoted

DOWNLOAD = "download it again"
JSON_BYTES = 32_000_000
COPY_BYTES = 256_000_000  # the largest file that travels with weights is a tokenizer of some 40 MB
TMP_PREFIX = ".tmp-"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_CHUNK = 1 << 22
_NESTED = 100
HALF_FETCHED = (".incomplete", ".part", ".crdownload", ".aria2")
_MAY_BE_PAGES = ("README", "LICENSE", "NOTICE", "USE_POLICY")
_POINTER = re.compile(rb"version https?://[\w./-]*git-(?:lfs|media)|version https://hawser")
_PAGE = re.compile(rb"(?is)(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]")
_ANSWERS = (b"Entry not found", b"Repository not found", b"Invalid username or password", b"Access to model ")


# ---- where a file is, and what it is ---------------------------------------------------------------------------------


def inside(path: str | Path, root: str | Path | None = None) -> Path:
    """The real place of ``path``, which must be in ``root`` (default: its folder) or in the hub cache of ``root``.

    FileNotFoundError if nothing is there, ValueError if it is a link that leads elsewhere.
    """
    path = Path(path)
    try:
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"{plain(path)}: refused: a link to nothing; remove it, or copy the file there") from None
        raise FileNotFoundError(f"{plain(path)}: no such file{half_fetched(path)}") from None
    except OSError as error:
        what = "a link to itself" if error.errno == errno.ELOOP else str(error.strerror)
        raise ValueError(f"{plain(path)}: refused: {what}; copy the file there") from None
    home = Path(os.path.realpath(path.parent if root is None else root))
    if real != home and not real.is_relative_to(home) and not _is_cached(real, home):
        left = "its folder" if root is None or path.parent == Path(root) else plain(Path(root))
        cure = f"copy the file there (all of a folder without links: cp -RL {shlex.quote(plain(path.parent))} NEW)"
        raise ValueError(f"{plain(path)}: refused: a link that leaves {left}, to {plain(real)}; {cure}")
    return real


def _is_cached(real: Path, home: Path) -> bool:
    """``models--org--name/snapshots/<revision>/file -> ../../blobs/<hash>``, or the blobs that repositories share."""
    for folder in (home, *home.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and "--" in repository.name:
            shared = repository.parent / "blobs"
            is_shared = real.parent.parent == shared and re.fullmatch(r"[0-9a-f]{2}", real.parent.name) is not None
            return real.parent == repository / "blobs" or is_shared
    return False


def regular(path: str | Path, root: str | Path | None = None) -> Path:
    """``path`` if it is a regular file inside ``root`` (see ``inside``); a ValueError if it is anything else."""
    path = Path(path)
    kind = stat.S_IFMT(inside(path, root).stat().st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{plain(path)}: {_KINDS.get(kind, 'a special file')}, not a regular file; put the file there")
    return path


def refuse_placeholder(path: Path, start: bytes) -> None:
    """ValueError, with the cure, if a file begins as a git-lfs pointer or as a page of a web server does."""
    if _POINTER.match(start):
        oid, size = re.search(rb"\noid sha256:([0-9a-f]{12})", start), re.search(rb"\nsize (\d{1,15})\b", start)
        sized = format_size(int(size[1])) if size else "of unknown size"
        what = f"oid {f'sha256:{oid[1].decode()}...' if oid else 'unknown'}, {sized}"
        raise ValueError(f"{plain(path)}: a git-lfs pointer ({what}), not the file itself; run: git lfs pull")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.name.startswith(_MAY_BE_PAGES):
        return
    if _PAGE.match(text) or (text.startswith(b"<?xml") and b"<Error>" in text):
        what = "a web page, not the file itself; log in if the repository asks for it"
        raise ValueError(f"{plain(path)}: {what}, and {DOWNLOAD}")
    if len(start) < 500 and text.startswith(_ANSWERS):
        said = quoted(text.decode("utf-8", "replace").strip())
        raise ValueError(f"{plain(path)}: the answer of a web server ({said}), not the file itself; {DOWNLOAD}")


def half_fetched(path: Path) -> str:
    """The cure if an interrupted download has left part of the file."""
    for ending in HALF_FETCHED:
        if (part := path.with_name(path.name + ending)).is_file():
            return f", only {plain(part.name)} of an interrupted download; run it again, it resumes"
    return ""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_start(path: str | Path, root: str | Path | None = None, *, cure: str = DOWNLOAD) -> bytes:
    """The first 1024 bytes of a regular file that is neither empty nor a placeholder."""
    path = regular(path, root)
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        raise ValueError(f"{plain(path)}: 0 bytes; {cure}")
    refuse_placeholder(path, start)
    return start


def read_bytes(
    path: str | Path, root: str | Path | None = None, *, limit: int = JSON_BYTES, cure: str = DOWNLOAD
) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes. ``cure`` ends the message about a bad one."""
    path = regular(path, root)
    with path.open("rb") as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        sizes = f"{format_size(path.stat().st_size)}, more than {format_size(limit)}"
        raise ValueError(f"{plain(path)}: {sizes}, which such a file never has; {cure}")
    refuse_placeholder(path, data[:1024])
    return data


def read_text(
    path: str | Path, root: str | Path | None = None, *, limit: int = JSON_BYTES, cure: str = "save it as UTF-8"
) -> str:
    """The same as text in UTF-8, without a byte order mark."""
    data = read_bytes(path, root, limit=limit, cure=cure)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{plain(Path(path))}:{line}: not UTF-8 (byte {error.start}); {cure}") from None


def read_json(
    path: str | Path, root: str | Path | None = None, *, limit: int = JSON_BYTES, cure: str = DOWNLOAD
) -> Any:
    """The value of a JSON file, or a ValueError with ``file:line:column``. A repeated key must repeat its value."""
    text = read_text(path, root, limit=limit, cure=cure)
    place, reason = "", "0 bytes" if not text else "only white space"
    if text.strip():
        try:
            value = json.loads(text, object_pairs_hook=_unambiguous)
            if "\\ud" in text.lower():
                json.dumps(value, ensure_ascii=False).encode()
            if text.count("[") + text.count("{") > _NESTED and _is_deep(value):
                raise RecursionError
            return value
        except json.JSONDecodeError as error:
            place, reason = f":{error.lineno}:{error.colno}", f"not valid JSON ({error.msg})"
        except RecursionError:
            reason = "not valid JSON: nested too deeply"
        except UnicodeEncodeError:
            reason = "not valid JSON: half of a surrogate pair (\\ud800 to \\udfff)"
        except ValueError as error:
            why = error if isinstance(error, Ambiguous) else "a whole number of thousands of digits"
            reason = f"not valid JSON: {why}"
    raise ValueError(f"{plain(Path(path))}{place}: {reason}; {cure}")


def _is_deep(value: Any) -> bool:
    level: list[Any] = [[value]]
    for _ in range(_NESTED):
        held = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for one in held for inner in one if isinstance(inner, dict | list)]
    return bool(level)


class Ambiguous(ValueError):  # noqa: N818
    """A key of a JSON object with two values."""


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise Ambiguous(f"{quoted(key)} is given twice, with different values")
    return found


# ---- writing ---------------------------------------------------------------------------------------------------------


def create(path: str | Path) -> IO[bytes]:
    """A new file for writing, mode 0644 less the umask; FileExistsError if one is there, which may be mapped."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o644))


def sync(file: IO[Any]) -> None:
    """Everything written so far is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path, root: str | Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write, which replaces ``path`` when the block ends without an error; otherwise ``path`` is unchanged.

    A link of that name is replaced, not followed. If ``root`` is given, the folder must be inside it.
    """
    path = Path(path)
    if root is not None:
        inside(path.parent, root)
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{plain(path)}: a folder is there; remove it or choose another place")
    tmp = path.with_name(f"{TMP_PREFIX}{secrets.token_hex(8)}")
    try:
        with create(tmp) as file:
            yield file
            sync(file)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def replace_bytes(path: str | Path, data: bytes, root: str | Path | None = None) -> None:
    with replacing(path, root) as file:
        file.write(data)


def replace_text(path: str | Path, text: str, root: str | Path | None = None) -> None:
    replace_bytes(path, text.encode("utf-8", "backslashreplace"), root)


def appending(path: str | Path, root: str | Path | None = None) -> TextIO:
    """A regular file, opened for appending and created if need be; ValueError if it is a link or a special file."""
    path = Path(path)
    if root is not None:
        inside(path.parent, root)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError:
        if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
            raise ValueError(f"{plain(path)}: a link or special file, which is not written to; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{plain(path)}: a device, which is not written to; remove it")
    return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace", buffering=1)


def append_text(path: str | Path, text: str, root: str | Path | None = None) -> None:
    with appending(path, root) as file:
        file.write(text)


def copy(
    source: str | Path,
    destination: str | Path,
    root: str | Path | None = None,
    *,
    limit: int = COPY_BYTES,
    depth: int = 8,
) -> None:
    """Copy a file, or a folder of files, to a new place. Every file must pass ``regular``."""
    source, destination = Path(source), Path(destination)
    root = source.parent if root is None else Path(root)
    if inside(source, root).is_dir():
        if not depth:
            raise ValueError(f"{plain(source)}: folders nested too deeply; copy only the files that are needed")
        destination.mkdir(mode=0o755)
        for entry in sorted(source.iterdir()):
            if entry.is_symlink() and entry.is_dir():
                raise ValueError(f"{plain(entry)}: refused: a link to a folder; copy the folder")
            copy(entry, destination / entry.name, root, limit=limit, depth=depth - 1)
        return
    with regular(source, root).open("rb") as reader:
        if (size := os.fstat(reader.fileno()).st_size) > limit:
            raise ValueError(f"{plain(source)}: {format_size(size)}, too large to be copied; remove it")
        piece = reader.read(1024)
        refuse_placeholder(source, piece)
        with create(destination) as writer:
            while piece:
                writer.write(piece)
                piece = reader.read(_CHUNK)
            sync(writer)
