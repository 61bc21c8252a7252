"""What a run ran on: versions, devices, and the commit of the folder. No program is started to find out.

In particular not ``git``: it runs what a repository's config and attributes name (fsmonitor, filters, hooks, diff
drivers). Here neither is read. https://git-scm.com/docs/gitrepository-layout
"""

import importlib.metadata
import os
import platform
import re
import shlex
import stat
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from tt_ckpt.redaction import redact

PACKAGES = (
    "tt-models",
    "tt-peft",
    "tt-data",
    "tt-ckpt",
    "tt-train",
    "tt-cli",
    "torch",
    "torchao",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "huggingface_hub",
    "omegaconf",
    "transformers",
    "peft",
)
_LIMIT = 1 << 24  # bytes of packed-refs; the other files are a line each
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REF = re.compile(r"refs/(?!.*(?:\.\.|//|/\.|@\{))[^\s~^:?*\[\\]{1,200}")


def collect() -> dict[str, Any]:
    """Versions, devices and settings as plain data, for ``tt env`` and a run's manifest; no value of any secret."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": " ".join((platform.system(), platform.release(), platform.machine())),
        "packages": versions(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "variables": {
            name: _address(os.environ[name]) if name == "HF_ENDPOINT" else redact(os.environ[name])
            for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE")
            if name in os.environ
        },
    }


def _address(text: str) -> str:
    """An address without its login, which may be a password or a token, and without its query."""
    text = re.sub(r"^([\w+.-]*://)?.*@", r"\1[redacted]@", text)
    return redact(re.sub(r"[?#].*", "?[redacted]", text))


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def versions() -> dict[str, str]:
    """The installed version of each package that matters; absent ones are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command that started this process, as a user would type it."""
    program = Path(sys.argv[0])
    name = "python -m " + program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([*name.split(), *sys.argv[1:]])


def git_state(folder: Path | None = None) -> dict[str, str | None] | None:
    """``commit`` and ``branch`` (None if it is detached) of the work tree that ``folder`` is in, by default the working
    folder; None if it is in none, or its files are not the user's, are links, or are not understood.

    Whether files have changed since the commit is not known: only git could tell, and git runs programs. As with git,
    the search stops below the folders of ``GIT_CEILING_DIRECTORIES``.
    """
    try:
        place = (folder or Path.cwd()).resolve()
        ceilings = set(os.environ.get("GIT_CEILING_DIRECTORIES", "").split(os.pathsep))
        above = takewhile(lambda parent: str(parent) not in ceilings, place.parents)
        repository = next((found for parent in (place, *above) if (found := _repository(parent))), None)
        return None if repository is None else _head(*repository)
    except (OSError, ValueError):
        return None


def _repository(folder: Path) -> tuple[Path, Path] | None:
    """The folders of HEAD and of the refs, if ``folder`` is the top of a work tree: one, or two if it is a linked one.

    Files of a repository in ``folder`` itself, without ``.git``, are not a repository here.
    """
    entry = folder / ".git"
    if not os.path.lexists(entry):
        return None
    _check_owner(folder.lstat())
    if stat.S_ISDIR(entry.lstat().st_mode):
        return entry, entry
    own = Path(os.path.normpath(folder / _line(entry).removeprefix("gitdir:").strip()))
    if own.parent.name != "worktrees" or Path(_line(own / "gitdir")) != entry:
        raise ValueError("the repository does not know this work tree")
    return own, own.parent.parent


def _head(own: Path, common: Path) -> dict[str, str | None]:
    head = _line(own / "HEAD")
    if _HASH.fullmatch(head):
        return {"commit": head, "branch": None}
    name = head.removeprefix("ref:").strip()
    if not head.startswith("ref:") or not _REF.fullmatch(name) or not name.isprintable():
        raise ValueError("HEAD is not understood")
    commit = _line(common / name) if os.path.lexists(common / name) else _packed(common / "packed-refs", name)
    if not _HASH.fullmatch(commit):
        raise ValueError("the ref is not a commit")
    return {"commit": commit, "branch": name.removeprefix("refs/heads/")}


def _packed(file: Path, name: str) -> str:
    lines = (line.partition(" ") for line in _read(file, _LIMIT).splitlines())
    return next((commit for commit, _, ref in lines if ref == name), "")


def _line(file: Path) -> str:
    return _read(file, 4096).strip()


def _read(file: Path, limit: int) -> str:
    """A regular file of the user's in a folder of the user's, neither of them a link."""
    if Path(os.path.realpath(file)) != file:
        raise ValueError("a link")
    _check_owner(file.parent.lstat())
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        found = os.fstat(handle)
        _check_owner(found)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise ValueError("not a small regular file")
        return stream.read(limit).decode("utf-8")


def _check_owner(found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or stat.S_ISLNK(found.st_mode):
        raise ValueError("not the user's")
