"""One writer per run directory: ``run.lock`` names the process that writes, which touches the file while it lives.

It is a line of JSON such as ``{"pid": 4711, "host": "node-3", "born": "8a1f... 912345"}``. ``born`` (boot and start
time, if the system knows them) tells a process from a later one with the same number. The file is removed when the
writer ends; what a killed writer leaves behind is stale, and is taken over.
"""

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tt_ckpt import files
from tt_ckpt.shown import plain
from tt_train.errors import ConfigError

LOCK = "run.lock"
BEAT_S = 10.0  # the writer touches its file this often
_LARGEST = 4096  # bytes of a lock
STALE_S = 60.0  # on another host, whose processes cannot be seen, an older file is stale


class RunLock:
    """``acquire`` makes this process the writer of ``folder``; ``release`` ends that."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._released = threading.Event()
        self._owner: int | None = None

    def acquire(self) -> None:
        """ConfigError if a living process writes there already."""
        if self.path.is_dir() and not self.path.is_symlink():
            raise ConfigError([f"output_dir: {plain(self.path)} is a folder, not a lock; remove it"])
        own = _beside(self.path)
        with files.create(own) as file:
            file.write(f"{json.dumps(_myself())}\n".encode())
        try:
            while not _name_if_free(own, self.path):
                _remove_if_stale(self.path)
        finally:
            own.unlink(missing_ok=True)
        self._owner = os.getpid()
        threading.Thread(target=self._beat, name="tt-train lock", daemon=True).start()

    def release(self) -> None:
        """Remove the file. In a fork of the writer this does nothing."""
        self._released.set()
        if self._owner == os.getpid():
            self.path.unlink(missing_ok=True)
            self._owner = None

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self.path, follow_symlinks=False)
            except OSError:
                continue  # the folder may be out of reach for a while


def writer_of(folder: Path) -> dict[str, Any] | None:
    """The living process that writes to a run directory (``pid``, ``host``); None if there is none, or it has died."""
    return _living_holder(folder / LOCK)


def _living_holder(path: Path) -> dict[str, Any] | None:
    try:
        holder = files.read_json(path, limit=_LARGEST)
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    if not isinstance(holder, dict):
        return None
    if holder.get("host") != socket.gethostname():
        return holder if abs(age) < STALE_S else None  # a time to come is of a clock that is wrong, or made up
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 1 << 31 or not _lives(pid):
        return None
    born = _born(pid)
    return holder if None in (born, holder.get("born")) or holder["born"] == born else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return (_proc_stat(pid) or ["R"])[0] != "Z"  # killed, and not yet waited for


def _remove_if_stale(path: Path) -> None:
    """Take a dead writer's file away; ConfigError if the writer lives."""
    holder = _living_holder(path)
    if holder is None:
        aside = _beside(path)
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        holder = _living_holder(aside)
        if holder is not None:  # another process took it over since we looked: give it back
            _name_if_free(aside, path)
        aside.unlink()
    if holder is not None:
        who = f"process {plain(holder.get('pid'))} on {plain(holder.get('host'))}"
        cure = f"wait for its end, stop it, or choose another -o; if it is not a run of tt, remove {path.name}"
        raise ConfigError([f"output_dir: {plain(path.parent)} is being written by {who} (see {path.name}); {cure}"])


def _name_if_free(file: Path, name: Path) -> bool:
    """Give ``file`` a second name, whole and at once; False if something has that name."""
    try:
        os.link(file, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with name.open("xb") as target:
                target.write(file.read_bytes())
        except FileExistsError:
            return False
    return True


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid())}


def _born(pid: int) -> str | None:
    """Boot and start time of a process on Linux; None elsewhere."""
    stat = _proc_stat(pid)
    if stat is None:
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {stat[19]}"


def _proc_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold blanks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
