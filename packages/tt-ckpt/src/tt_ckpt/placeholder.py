"""What an accident leaves in the place of a file: a git-lfs pointer, a web page, a part of a download."""

import re
from pathlib import Path

from tt_ckpt.shown import format_size, plain, quoted

DOWNLOAD = "download it again"
HALF_FETCHED = (".incomplete", ".part", ".crdownload", ".aria2")
TEXTS = ("README", "LICENSE", "NOTICE", "USE_POLICY")
_POINTER = re.compile(rb"version https?://[\w./-]*git-(?:lfs|media)|version https://hawser")
_PAGE = re.compile(rb"(?is)(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]")
_SENTENCES = (b"Entry not found", b"Repository not found", b"Invalid username or password", b"Access to model ")


def refuse_placeholder(path: Path, start: bytes) -> None:
    """ValueError, with the cure, if the first bytes of a file are a git-lfs pointer or a page of a web server."""
    if _POINTER.match(start):
        oid, size = re.search(rb"\noid sha256:([0-9a-f]{12})", start), re.search(rb"\nsize (\d{1,15})\b", start)
        sized = format_size(int(size[1])) if size else "of unknown size"
        what = f"oid {f'sha256:{oid[1].decode()}...' if oid else 'unknown'}, {sized}"
        raise ValueError(f"{plain(path)}: a git-lfs pointer ({what}), not the file itself; run: git lfs pull")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.name.startswith(TEXTS):
        return  # which may be pages
    if _PAGE.match(text) or (text.startswith(b"<?xml") and b"<Error>" in text):
        raise ValueError(
            f"{plain(path)}: a web page, not the file itself; log in if the repository asks for it, and {DOWNLOAD}"
        )
    if len(start) < 500 and text.startswith(_SENTENCES):
        said = quoted(text.decode("utf-8", "replace").strip())
        raise ValueError(f"{plain(path)}: the answer of a web server ({said}), not the file itself; {DOWNLOAD}")


def half_fetched(path: Path) -> str:
    """The cure if a part of the file is there, as a download that was interrupted leaves it."""
    for ending in HALF_FETCHED:
        if (part := path.with_name(path.name + ending)).is_file():
            return f", only {plain(part.name)} of an interrupted download; run it again, it resumes"
    return ""
