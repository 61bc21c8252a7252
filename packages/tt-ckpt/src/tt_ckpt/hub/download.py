"""Models from the hub, through huggingface_hub: its cache, environment variables and tokens. Checked by hash.

There is no argument for a token: it comes from HF_TOKEN or ``hf auth login``, and no message shows it.
"""

import fnmatch
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ckpt import commit
from tt_ckpt.files import read_text, refuse_placeholder
from tt_ckpt.hub.endpoint import check_endpoint, check_numbers, limit_bodies
from tt_ckpt.hub.failures import explained, retrying
from tt_ckpt.hub.names import check_listing, check_repo_id, check_revision
from tt_ckpt.shown import format_size, listed, plain

logger = logging.getLogger(__name__)

WANTED = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*merges.txt", "*vocab.txt", "LICENSE*",
          "NOTICE*", "USE_POLICY*", "README.md")  # fmt: skip
UNWANTED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*.gguf", "training_args*", "runs/*")
FIRST_CONTACT_S = 1.0  # if a hub has not answered at all: the name may be a typo, or there is no network
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Download:
    """The result of ``download``. Plain data."""

    repo_id: str
    revision: str
    path: str
    files: list[str]
    num_bytes: int
    num_verified: int
    seconds: float


@dataclass(frozen=True)
class _Remote:
    """A file of a repository, with the size and hash that the hub states."""

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    output_dir: str | Path | None = None,
    allow: Sequence[str] = WANTED,
    ignore: Sequence[str] = UNWANTED,
    retry_s: float = 120.0,
    dry_run: bool = False,
) -> Download:
    """Fetch a repository into the hub's cache, or into ``output_dir``, and compare every file with the hub's hash.

    ``revision``: branch, tag or commit. ``allow``, ``ignore``: patterns of file names; the default is safetensors,
    JSON, tokenizer and license files. Files that were fetched before are not fetched again; other files with their
    names are a FileExistsError. Interrupted transfers resume. Temporary failures are retried for ``retry_s`` seconds.
    ``dry_run``: ask the hub which files these are, check the disk, and write nothing.
    """
    started = time.monotonic()
    check_endpoint()
    check_repo_id(repo_id)
    check_revision(revision)
    if output_dir is not None:
        _check_target(Path(output_dir))
    if _is_offline():
        return _from_cache(repo_id, revision, output_dir)
    until = started + retry_s
    first = started + min(retry_s, FIRST_CONTACT_S)
    sha, remote = retrying(repo_id, until, lambda: _list_files(repo_id, revision), revision, contact=first)
    wanted = [file for file in remote if _matches(file.name, allow, ignore)]
    if not wanted:
        there = listed([file.name for file in remote]) or "nothing"
        raise FileNotFoundError(f"{repo_id}: has no file of a model; there is: {there}; give the id of another")
    if not any(file.name.endswith(".safetensors") for file in wanted) and any(
        file.name.endswith((".bin", ".pth", ".pt", ".gguf")) for file in remote
    ):
        logger.warning("%s: no safetensors among the wanted files, only pickles or GGUF; see tt convert", repo_id)
    if output_dir is not None:
        _refuse_own_files(repo_id, wanted, Path(output_dir))
    place = _check_space(repo_id, wanted, output_dir)
    names, num_bytes = [file.name for file in wanted], sum(file.size for file in wanted)
    if dry_run:
        return Download(repo_id=repo_id, revision=sha, path=str(place), files=names, num_bytes=num_bytes,
                        num_verified=0, seconds=round(time.monotonic() - started, 3))  # fmt: skip
    options: dict[str, Any] = {"allow_patterns": [_literal(file.name) for file in wanted], "local_dir": output_dir}
    limit_bodies(max((file.size for file in wanted), default=0) + 1)
    path = Path(retrying(repo_id, until, lambda: _fetch(repo_id, revision, options)))
    if output_dir is None and path.name != sha:  # the branch moved meanwhile: compare with the new commit
        sha, remote = retrying(repo_id, until, lambda: _list_files(repo_id, path.name))
        wanted = [file for file in remote if _matches(file.name, allow, ignore)]
    if damaged := [file for file in wanted if not _is_whole(path / file.name, file)]:
        again = options | {"allow_patterns": [_literal(file.name) for file in damaged], "force_download": True}
        _replace(repo_id, path, damaged, lambda: retrying(repo_id, until, lambda: _fetch(repo_id, revision, again)))
    for file in wanted:  # the repository itself may have a git-lfs pointer or a web page in the place of a file
        with (path / file.name).open("rb") as opened:
            refuse_placeholder(path / file.name, opened.read(1024))
    return Download(repo_id=repo_id, revision=sha, path=str(path), files=names, num_bytes=num_bytes,
                    num_verified=sum(1 for file in wanted if file.sha256 or file.git_sha1),
                    seconds=round(time.monotonic() - started, 3))  # fmt: skip


def _from_cache(repo_id: str, revision: str | None, output_dir: str | Path | None) -> Download:
    started, path = time.monotonic(), snapshot(repo_id, revision=revision)
    if output_dir is not None:
        raise FileNotFoundError(f"{repo_id}: HF_HUB_OFFLINE is set: not fetched again; copy it from {path}")
    names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    size = sum((path / name).stat().st_size for name in names)
    seconds = round(time.monotonic() - started, 3)
    return Download(repo_id=repo_id, revision=path.name, path=str(path), files=names, num_bytes=size,
                    num_verified=0, seconds=seconds)  # fmt: skip


def _replace(repo_id: str, path: Path, damaged: list[_Remote], fetch: Callable[[], object]) -> None:
    """Remove damaged files and fetch them again; OSError, without them, if they are damaged again."""
    for file in damaged:
        logger.warning("%s: %s is damaged (its hash differs from the hub's); fetching it again", repo_id, file.name)
        _forget(path, file.name)
    fetch()
    still = [file.name for file in damaged if not _is_whole(path / file.name, file)]
    for name in still:
        _forget(path, name)
    if still:
        raise OSError(f"{repo_id}: {', '.join(still)} arrived damaged twice (hash differs); try later")


def snapshot(repo_id: str, *, revision: str | None = None) -> Path:
    """The local snapshot of a repository: from the cache if it is whole, else downloaded and verified."""
    check_numbers()
    check_repo_id(repo_id)
    check_revision(revision)
    try:
        patterns: dict[str, Any] = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
        cached = Path(api().snapshot_download(repo_id, revision=revision, local_files_only=True, **patterns))
        if _COMMIT.fullmatch(cached.name) and any(cached.glob("*.json")):
            return cached
    except Exception as error:
        if _is_offline():
            raise explained(error, repo_id, revision) from None
    return Path(download(repo_id, revision=revision).path)


def api() -> Any:
    """The hub that HF_ENDPOINT names."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _list_files(repo_id: str, revision: str | None) -> tuple[str, list[_Remote]]:
    info = api().model_info(repo_id, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    check_listing(repo_id, [sibling.rfilename for sibling in siblings])
    if not _COMMIT.fullmatch(str(info.sha)):
        raise OSError(f"{repo_id}: the hub names no commit; is HF_ENDPOINT a hub?")
    found = []
    for sibling in siblings:
        if sibling.size is not None and not 0 <= sibling.size < 1 << 50:
            raise OSError(f"{repo_id}: {sibling.rfilename}: {sibling.size} bytes, says the hub; report it there")
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        found.append(_Remote(sibling.rfilename, sibling.size or 0, sha256, None if sha256 else sibling.blob_id))
    return str(info.sha), found


def _fetch(repo_id: str, revision: str | None, options: dict[str, Any]) -> str:
    path = str(api().snapshot_download(repo_id, revision=revision, **options))
    if options["local_dir"] is None and not _COMMIT.fullmatch(Path(path).name):
        raise OSError(f"{repo_id}: the hub names no commit; is HF_ENDPOINT a hub?")
    return path


def _matches(name: str, allow: Sequence[str], ignore: Sequence[str]) -> bool:
    wanted, unwanted = (any(fnmatch.fnmatch(name, one) for one in patterns) for patterns in (allow, ignore))
    return wanted and not unwanted


def _literal(name: str) -> str:
    """A pattern that matches only this name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _check_space(repo_id: str, wanted: list[_Remote], output_dir: str | Path | None) -> Path:
    """The folder to download to, which has room."""
    import shutil

    from huggingface_hub import constants

    place = Path(output_dir or constants.HF_HUB_CACHE)
    root = place.absolute()
    while not root.exists():
        root = root.parent
    needed, free = sum(file.size for file in wanted), shutil.disk_usage(root).free
    if needed > free:
        raise OSError(f"{repo_id}: needs {format_size(needed)}, {root} has {format_size(free)} free")
    return place


def _check_target(folder: Path) -> None:
    """ValueError or FileExistsError if files cannot be put into this folder."""
    from huggingface_hub import constants

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{plain(folder)}: a file; choose another directory")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{plain(folder)}: a link to nothing; remove it, or choose another directory")
    if folder.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        raise ValueError(f"{plain(folder)}: in the hub's cache; leave -o out, or choose another directory")
    for record in (".cache", ".cache/huggingface", ".cache/huggingface/download"):  # huggingface_hub writes there
        _refuse_link(folder, folder / record)


def _refuse_link(folder: Path, path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{plain(path)}: a link; what is fetched stays in {plain(folder)}: remove the link")


def _refuse_own_files(repo_id: str, wanted: list[_Remote], folder: Path) -> None:
    """FileExistsError if a wanted file is the user's own or was changed since it was fetched; ValueError for a link."""
    for file in wanted:
        record = f".cache/huggingface/download/{file.name}"
        for name in (file.name, f"{record}.metadata", f"{record}.lock"):
            for place in (folder / name, *(folder / name).parents):
                if place == folder:
                    break
                _refuse_link(folder, place)
    there = [file for file in wanted if os.path.lexists(folder / file.name) and not was_fetched(folder, file.name)]
    if own := ", ".join(file.name for file in there if not _is_whole(folder / file.name, file)):
        cure = f"other than {repo_id}'s; choose another directory, or remove what is to be fetched again"
        raise FileExistsError(f"{folder}: {own}: not as a download left it, and {cure}")


def _is_whole(path: Path, file: _Remote) -> bool:
    """Whether size and hash are those of the hub: sha256 for large files, git's sha1 for others."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    expected = file.sha256 or file.git_sha1
    return expected is None or content_hash(path, expected) == expected


def _forget(folder: Path, name: str) -> None:
    """Remove a file of a snapshot, and the blob that its link points to if that is in the cache."""
    path = folder / name
    if path.is_symlink():
        blob = path.resolve()
        if folder.parent.name == "snapshots" and blob.parent == folder.parents[1].resolve() / "blobs":
            blob.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# ---- hashes ----------------------------------------------------------------------------------------------------------


def was_fetched(directory: Path, name: str) -> bool:
    """Whether a download put this file into ``directory``, and nobody has written to it since."""
    try:
        return (directory / name).stat().st_mtime - 1 <= float(recorded(directory, name)[2])
    except (OSError, ValueError, IndexError):
        return False


def recorded(directory: Path, name: str) -> list[str]:
    """The commit, hash and time that huggingface_hub noted about a file that it put into a directory, a line each."""
    try:
        text = read_text(directory / ".cache/huggingface/download" / f"{name}.metadata", directory, limit=10_000)
    except (OSError, ValueError):
        return []
    return text.splitlines()


def content_hash(file: Path, like: str) -> str:
    """The sha256 of a file, or git's sha1 if ``like`` has the length of one."""
    if len(like) == 64:
        return commit.sha256_of(file)
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
