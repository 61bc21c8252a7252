"""Names on the hub: repository ids and revisions that a user types, and file names in a listing."""

import re
from collections.abc import Sequence

from tt_ckpt.safe_names import check_basename
from tt_ckpt.shown import plain, quoted

_WORD = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_WORD}/)?{_WORD}", re.ASCII)
_REVISION = re.compile(r"[\w][\w./+=#@-]*", re.ASCII)
_LONGEST = 96
_LONGEST_NAME = 1000
_MOST_FILES = 100_000
_OWN = (".git", ".cache")  # folders of git and of huggingface_hub itself


def check_repo_id(repo_id: str) -> None:
    """ValueError, with a suggestion, if it is not ``name`` or ``org/name``."""
    bad = not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or len(repo_id) > _LONGEST
    if not bad and not repo_id.endswith(".git"):
        return
    cure = "give one such as Qwen/Qwen3-0.6B"
    page = re.fullmatch(r"https?://[\w.-]+(?::\d+)?/(?:models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:[/?#].*)?", repo_id)
    at = re.fullmatch(r"([\w.-]+/[\w.-]+)[@:]([\w./-]+)", repo_id)
    if page and _REPO_ID.fullmatch(page[1]):
        cure = f"did you mean {page[1]}?"
    elif at and _REPO_ID.fullmatch(at[1]):
        cure = f"did you mean {at[1]} --revision {at[2]}?"
    raise ValueError(f"{plain(repo_id)}: neither a directory here nor a repository id; {cure}")


def check_revision(revision: str | None) -> None:
    """ValueError if it is not the name of a branch, tag or commit, since it becomes a path of the cache."""
    if revision is None:
        return
    parts = revision.split("/")
    if not _REVISION.fullmatch(revision) or len(revision) > 250 or ".." in revision or "" in parts or "." in parts:
        raise ValueError(f"revision: {quoted(revision)} is not a branch, tag or commit; give one such as main")


def check_listing(repo_id: str, names: Sequence[str]) -> None:
    """ValueError if the files of a repository would not be plain files in one folder."""
    if len(names) > _MOST_FILES:
        raise ValueError(f"{repo_id}: {len(names)} files, no model has more than {_MOST_FILES}; use hf download")
    seen: dict[str, str] = {}
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        for part in parts:
            check_basename(part, where=repo_id)
        if len(name) > _LONGEST_NAME or parts[0].casefold() in _OWN or ".git" in map(str.casefold, parts):
            raise ValueError(f"{repo_id}: refused the file name {quoted(name)}: not a file of a model; report it there")
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"{repo_id}: {quoted(other)} and {quoted(name)} are one file on a disk that ignores case;"
                             " fetch one of them with --allow")  # fmt: skip
        folders |= {"/".join(parts[:i]).casefold() for i in range(1, len(parts))}
    if both := sorted(folders & set(seen)):
        raise ValueError(f"{repo_id}: {quoted(seen[both[0]])} is a file and a folder; report it there")
