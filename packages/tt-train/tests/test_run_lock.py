"""One writer per run directory."""

import json
import os
import signal
import socket
import time

import pytest

from tt_train import ConfigError
from tt_train.run.lock import LOCK, STALE_S, RunLock, writer_of


def child_that(action):
    """A forked process that runs ``action``; its number."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        action()
        os._exit(0)
    return pid


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    assert writer_of(tmp_path)["pid"] == os.getpid()
    with pytest.raises(ConfigError, match=rf"written by process {os.getpid()} on .*choose another -o"):
        second.acquire()
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()
    second.release()


@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_killed_writer_left_is_taken_over(tmp_path, reaped):
    def hold():
        RunLock(tmp_path).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = child_that(hold)
    os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    assert (tmp_path / LOCK).exists()
    assert writer_of(tmp_path) is None
    RunLock(tmp_path).acquire()
    assert writer_of(tmp_path)["pid"] == os.getpid()
    if not reaped:
        os.waitpid(pid, 0)


def test_a_later_process_with_the_same_number_is_not_the_writer(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    held = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(held | {"born": "another boot 1"}))
    assert writer_of(tmp_path) is None


def test_a_writer_on_another_host_counts_while_it_gives_signs_of_life(tmp_path):
    file = tmp_path / LOCK
    file.write_text(json.dumps({"pid": 1, "host": socket.gethostname() + "-other", "born": None}))
    assert writer_of(tmp_path)["pid"] == 1
    with pytest.raises(ConfigError, match="is being written by process 1"):
        RunLock(tmp_path).acquire()
    old = time.time() - STALE_S - 1
    os.utime(file, (old, old))
    assert writer_of(tmp_path) is None
    RunLock(tmp_path).acquire()


def test_a_damaged_lock_is_stale(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": ')
    assert writer_of(tmp_path) is None
    RunLock(tmp_path).acquire()


def test_of_many_that_find_a_stale_lock_one_becomes_the_writer(tmp_path):
    (tmp_path / LOCK).write_text("")

    told, tell = os.pipe()
    gate, opener = os.pipe()

    def contend():
        os.close(opener)
        try:
            RunLock(tmp_path).acquire()
        except ConfigError:
            os.write(tell, b"-")
            return
        os.write(tell, b"+")
        os.read(gate, 1)  # holds it until all have tried

    children = [child_that(contend) for _ in range(6)]
    answers = b"".join(os.read(told, 1) for _ in children)
    os.close(opener)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(answers) == sorted(b"+-----")
    for end in (told, tell, gate):
        os.close(end)


def test_a_fork_of_the_writer_does_not_release_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    os.waitpid(child_that(lock.release), 0)
    assert writer_of(tmp_path)["pid"] == os.getpid()
