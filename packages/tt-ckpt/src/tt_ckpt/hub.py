"""Models from the hub, through huggingface_hub: its cache, its environment variables, its tokens. Checked by hash.

There is no argument for a token: it comes from HF_TOKEN or ``hf auth login``, and appears in no message.
"""

import difflib
import fnmatch
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tt_ckpt.commit import remove_tree
from tt_ckpt.names import check_basename
from tt_ckpt.redact import redact
from tt_ckpt.shown import format_size
from tt_ckpt.verify import content_hash, was_fetched

logger = logging.getLogger(__name__)

WANTED = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*merges.txt", "*vocab.txt", "LICENSE*",
          "NOTICE*", "USE_POLICY*", "README.md")  # fmt: skip
UNWANTED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*.gguf", "training_args*", "runs/*")
PUBLIC_HUB = "https://huggingface.co"
FIRST_CONTACT_S = 1.0  # for a hub that has not answered at all: perhaps the name is a typo, perhaps there is no network
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, kw_only=True)
class Download:
    """What ``download`` did. Plain data."""

    repo_id: str
    revision: str
    path: str
    files: list[str]
    num_bytes: int
    num_verified: int
    seconds: float


@dataclass(frozen=True)
class _Remote:
    """A file of a repository: its size and hash as the hub states them."""

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
) -> Download:
    """Fetch a repository into the hub's cache, or into ``output_dir``, and compare every file with the hub's hash.

    ``revision``: branch, tag or commit. ``allow``, ``ignore``: file name patterns; by default safetensors, JSON,
    tokenizer and license files. Files that are there already are not fetched again, others of their names are a
    FileExistsError; interrupted transfers resume; passing failures are retried for ``retry_s`` seconds.
    """
    started = time.monotonic()
    check_endpoint()
    if _is_offline():
        path = snapshot(repo_id, revision=revision)
        if output_dir is not None:
            raise FileNotFoundError(f"{repo_id}: HF_HUB_OFFLINE is set: not fetched again; copy it from {path}")
        names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
        size = sum((path / name).stat().st_size for name in names)
        seconds = round(time.monotonic() - started, 3)
        return Download(repo_id=repo_id, revision=path.name, path=str(path), files=names, num_bytes=size,
                        num_verified=0, seconds=seconds)  # fmt: skip
    until = started + retry_s
    first = started + min(retry_s, FIRST_CONTACT_S)
    commit, remote = _retrying(repo_id, until, lambda: _list_files(repo_id, revision), revision, contact=first)
    wanted = [file for file in remote if _matches(file.name, allow, ignore)]
    if not any(file.name.endswith(".safetensors") for file in wanted) and any(
        file.name.endswith((".bin", ".pth", ".pt", ".gguf")) for file in remote
    ):
        logger.warning("%s: no safetensors among the wanted files, only pickles or GGUF; see tt convert", repo_id)
    if output_dir is not None:
        _refuse_own_files(repo_id, wanted, Path(output_dir))
    _check_space(repo_id, wanted, output_dir)
    options: dict[str, Any] = {"allow_patterns": [_literal(file.name) for file in wanted], "local_dir": output_dir}
    path = Path(_retrying(repo_id, until, lambda: _fetch(repo_id, revision, options)))
    if output_dir is None and path.name != commit:  # the branch has moved meanwhile: compare with what came
        commit, remote = _retrying(repo_id, until, lambda: _list_files(repo_id, path.name))
        wanted = [file for file in remote if _matches(file.name, allow, ignore)]
    damaged = [file for file in wanted if not _is_whole(path / file.name, file)]
    for file in damaged:
        logger.warning("%s: %s is damaged (its hash differs from the hub's); fetching it again", repo_id, file.name)
        _forget(path / file.name)
    if damaged:
        _retrying(repo_id, until, lambda: _fetch(repo_id, revision, options))
        still = [file.name for file in damaged if not _is_whole(path / file.name, file)]
        for name in still:
            _forget(path / name)
        if still:
            raise OSError(f"{repo_id}: {', '.join(still)} arrived damaged twice (hash differs); try later")
    return Download(
        repo_id=repo_id,
        revision=commit,
        path=str(path),
        files=[file.name for file in wanted],
        num_bytes=sum(file.size for file in wanted),
        num_verified=sum(1 for file in wanted if file.sha256 or file.git_sha1),
        seconds=round(time.monotonic() - started, 3),
    )


def snapshot(repo_id: str, *, revision: str | None = None) -> Path:
    """The local snapshot of a repository: the cache's where it is whole, else downloaded and verified."""
    try:
        patterns: dict[str, Any] = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
        cached = Path(api().snapshot_download(repo_id, revision=revision, local_files_only=True, **patterns))
        if any(cached.glob("*.json")):
            return cached
    except Exception as error:
        if _is_offline():
            raise explained(error, repo_id, revision) from None
    return Path(download(repo_id, revision=revision).path)


def check_endpoint() -> None:
    """A token goes to the configured host: refuse plain http to others, warn when it is not the public hub."""
    from huggingface_hub import constants, get_token

    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme != "https" and parts.hostname not in _LOCAL_HOSTS:
        raise ValueError(f"HF_ENDPOINT: refused {redact(constants.ENDPOINT)}: expected https (http only for localhost)")
    if constants.ENDPOINT.rstrip("/") != PUBLIC_HUB and get_token():
        logger.warning("your Hugging Face token is sent to %s (HF_ENDPOINT), not to %s", parts.hostname, PUBLIC_HUB)


def api() -> Any:
    """The hub that HF_ENDPOINT names."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _list_files(repo_id: str, revision: str | None) -> tuple[str, list[_Remote]]:
    info = api().model_info(repo_id, revision=revision, files_metadata=True)
    found = []
    for sibling in info.siblings or []:
        for part in sibling.rfilename.split("/"):
            check_basename(part, where=repo_id)
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        found.append(_Remote(sibling.rfilename, sibling.size or 0, sha256, None if sha256 else sibling.blob_id))
    return str(info.sha), found


def _fetch(repo_id: str, revision: str | None, options: dict[str, Any]) -> str:
    return str(api().snapshot_download(repo_id, revision=revision, **options))


def _matches(name: str, allow: Sequence[str], ignore: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in allow) and not any(
        fnmatch.fnmatch(name, pattern) for pattern in ignore
    )


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _check_space(repo_id: str, wanted: list[_Remote], output_dir: str | Path | None) -> None:
    import shutil

    from huggingface_hub import constants

    root = Path(output_dir or constants.HF_HUB_CACHE).absolute()
    while not root.exists():
        root = root.parent
    needed, free = sum(file.size for file in wanted), shutil.disk_usage(root).free
    if needed > free:
        raise OSError(f"{repo_id}: needs {format_size(needed)}, {root} has {format_size(free)} free")


def _refuse_own_files(repo_id: str, wanted: list[_Remote], folder: Path) -> None:
    """A file of the user's own, or one changed since it was fetched, is not replaced."""
    there = [file for file in wanted if os.path.lexists(folder / file.name) and not was_fetched(folder, file.name)]
    if own := ", ".join(file.name for file in there if not _is_whole(folder / file.name, file)):
        cure = f"other than {repo_id}'s; choose another directory, or remove what is to be fetched again"
        raise FileExistsError(f"{folder}: {own}: not as a download left it, and {cure}")


def _is_whole(path: Path, file: _Remote) -> bool:
    """Size and hash as the hub states them: sha256 for large files, git's sha1 for the others."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    expected = file.sha256 or file.git_sha1
    return expected is None or content_hash(path, expected) == expected


def _forget(path: Path) -> None:
    """Remove a file of a snapshot and what its link points to, so that it is fetched again."""
    if path.is_symlink():
        remove_tree(path.resolve())
    path.unlink(missing_ok=True)


# ---- failures --------------------------------------------------------------------------------------------------------


def _retrying(
    repo_id: str, until: float, action: Callable[[], Any], revision: str | None = None, *, contact: float | None = None
) -> Any:
    """``action()``, again after passing failures with growing pauses while there is time; others are explained.

    ``contact``: when to give up on a hub that gives no answer at all.
    """
    pause = 0.5
    while True:
        try:
            return action()
        except Exception as error:
            answered = getattr(error, "response", None) is not None
            limit = until if answered or contact is None else min(until, contact)
            if not _is_passing(error) or time.monotonic() + pause > limit:
                if contact is not None and not answered and _is_passing(error):
                    raise _unreachable(error, repo_id) from None
                raise explained(error, repo_id, revision) from None
            logger.warning("%s: %s; trying again in %.1f s", repo_id, _first_line(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _unreachable(error: Exception, repo_id: str) -> ConnectionError:
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    return ConnectionError(
        f"{repo_id}: no directory of that name here, and {host} gives no answer ({_first_line(error)})"
    )


def _is_passing(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    transport = type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3"}
    return transport or isinstance(error, ConnectionError | TimeoutError) or "Consistency check failed" in str(error)


def explained(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """The same failure in one line that says what to do."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.GatedRepoError):
        token = "the account of your token" if get_token() else "an account, then `hf auth login` or HF_TOKEN"
        return PermissionError(f"{repo_id}: gated: accept its terms at {PUBLIC_HUB}/{repo_id} with {token}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id}: no revision {revision or 'of that name'}; see {PUBLIC_HUB}/{repo_id}")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "" if get_token() else "; if it is private, set HF_TOKEN"
        return FileNotFoundError(f"{repo_id}: no such repository, or private{hint}{_similar(repo_id)}")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{repo_id}: neither a directory here nor a repository id such as Qwen/Qwen3-0.6B")
    if constants.HF_HUB_OFFLINE:
        return FileNotFoundError(f"{repo_id}: not (wholly) in the cache, and HF_HUB_OFFLINE is set{_similar(repo_id)}")
    if _is_passing(error) or isinstance(error, errors.LocalEntryNotFoundError):
        host = urlsplit(constants.ENDPOINT).hostname
        return ConnectionError(f"{repo_id}: {host}: {_first_line(error)}; run it again, it goes on from there")
    if isinstance(error, OSError | ValueError) and not isinstance(error, errors.HfHubHTTPError):
        return type(error)(redact(str(error))) if type(error) in (OSError, ValueError) else error
    return OSError(f"{repo_id}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = redact(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _similar(repo_id: str) -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cached = [entry.name.removeprefix("models--").replace("--", "/") for entry in cache.glob("models--*")]
    close = difflib.get_close_matches(repo_id, cached, 1, 0.6)
    return f"; did you mean {close[0]}, which is in the cache?" if close and close[0] != repo_id else ""
